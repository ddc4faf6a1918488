"""Dropout written out: XLA's own gradient is too large, by the factor that makes up for zeros.

`native_dropout` of torch_xla 2.9.0 returns a mask that is multiplied by that factor already, and
`native_dropout_backward` multiplies by it once more. Its lazy tensors come by another way.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def kept_share(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """`x` where `keep` is true, 0 elsewhere, made up for."""
    return x * keep * (1 / (1 - p) if p < 1 else 0.0)


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = torch.rand(x.shape, dtype=torch.float32, device=x.device) >= p
    return kept_share(x, keep, p), keep


def _dropout_backward(gradient: Tensor, keep: Tensor, scale: float) -> Tensor:
    return gradient * keep * scale


#: Decompositions of dropout and of its gradient.
DROPOUT: Mapping[Any, Callable[..., Any]] = types.MappingProxyType(
    {
        _aten.native_dropout.default: _dropout,
        _aten.native_dropout_backward.default: _dropout_backward,
    }
)
