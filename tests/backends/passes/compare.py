"""A function by way of the passes and as it stands, with its gradients, in a given precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from runner.backends.passes.pipeline import Passes
from runner.config.schema import PassesConfig

Function = Callable[..., Tensor]


def outcome(
    function: Function, inputs: Sequence[Tensor], dtype: torch.dtype, *, passes: Passes | None
) -> list[Tensor]:
    """The function's value and its gradients by all inputs that are not whole numbers."""
    own = [one.detach().to(dtype) if one.is_floating_point() else one for one in inputs]
    leaves = [one.requires_grad_() for one in own if one.is_floating_point()]
    with passes.rewriting() if passes else contextlib.nullcontext(), sdpa_kernel(SDPBackend.MATH):
        value = function(*own)
        return [value.detach(), *torch.autograd.grad(value, leaves)]


def rewritten(function: Function, *inputs: Tensor) -> dict[str, int]:
    """Compares a function in float32 by way of the passes with float64 without them.

    Returns:
        What the passes changed.
    """
    passes = Passes(PassesConfig())
    expected = outcome(function, inputs, torch.float64, passes=None)
    got = outcome(function, inputs, torch.float32, passes=passes)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm(), (one, other)
        assert other.norm() > 0
    return passes.made
