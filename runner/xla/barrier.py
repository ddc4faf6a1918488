"""A functional operation that XLA moves nothing across: `torch.ops.runner.barrier`.

Without it XLA finds a computation that is done again, by a graph that wants to save memory, and
does it once. Source: `optimization_barrier_` (torch_xla 2.9.0), which works in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runner.xla.binding import binding

_library: Any = torch.library.Library("runner", "DEF")  # type: ignore[no-untyped-call]
_library.define("barrier(Tensor[] tensors) -> Tensor[]")

#: As a graph calls it.
BARRIER = torch.ops.runner.barrier.default


def barrier(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values, each to be had only when all of them are there."""
    made: list[Tensor] = BARRIER(list(tensors))
    return made


def _on_xla(tensors: list[Tensor]) -> list[Tensor]:
    behind = [tensor.clone() for tensor in tensors]
    binding._xla_optimization_barrier_(behind)
    return behind


def _described(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


_library.impl("barrier", _on_xla, "XLA")
_library.impl("barrier", _described, "Meta")
