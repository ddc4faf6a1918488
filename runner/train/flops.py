"""Floating-point operations of one training step, counted and not estimated by a formula."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from runner.backends.base import Recipe


def flops_per_step(recipe: Recipe, batch: Mapping[str, Tensor]) -> float | None:
    """FLOPs of forward and backward of one batch: products and sums of matrix operations.

    Args:
        recipe: The step; its model is described without data, not run.
        batch: A host batch, for shapes and types.

    Returns:
        The count, or None for a model that cannot run without data.

    Source: `torch.utils.flop_counter`, which counts matrix products, convolutions and
        attention, as MFU is defined on.
    """
    model = on_meta(recipe.model).train()
    described = {name: tensor.to("meta") for name, tensor in batch.items()}
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            recipe.loss(model, described).backward()  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None
    return float(counter.get_total_flops())


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a module whose tensors have shapes and types but no data."""
    memo: dict[int, Tensor] = {}
    for param in model.parameters():
        meta = torch.empty_like(param, device="meta")
        memo[id(param)] = nn.Parameter(meta, requires_grad=param.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
