"""How a tensor inside a step lies on a mesh: `torch.ops.runner.pin` in a traced graph.

Where parameters are cut over the devices that examples are cut over, XLA's partitioner has to
choose, and left alone it may gather activations. A pin tells it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

#: From a traced tensor, and the names of the axes that cut its first dimension, to the same lying
#: so.
Pinner = Callable[[Tensor, tuple[str, ...]], Tensor]
_pinner: Pinner | None = None


@contextlib.contextmanager
def pinned_by(pinner: Pinner | None) -> Iterator[None]:
    """Within it, pins are lowered by `pinner`; without one they do nothing."""
    global _pinner
    before, _pinner = _pinner, pinner
    try:
        yield
    finally:
        _pinner = before


class _Pinned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: str) -> Tensor:
        ctx.axes = axes
        pinned: Tensor = torch.ops.runner.pin(x, axes)
        return pinned

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.ops.runner.pin(gradients[0], ctx.axes), None


def pin(x: Tensor, axes: tuple[str, ...]) -> Tensor:
    """A tensor whose first dimension is cut over `axes`, and its gradient alike."""
    pinned: Tensor = _Pinned.apply(x, ",".join(axes))  # type: ignore[no-untyped-call]
    return pinned


_library: Any = torch.library.Library("runner", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("pin(Tensor x, str axes) -> Tensor")


def _on_xla(x: Tensor, axes: str) -> Tensor:
    return x.clone() if _pinner is None else _pinner(x, tuple(axes.split(",")))


_library.impl("pin", _on_xla, "XLA")
_library.impl("pin", lambda x, _: torch.empty_like(x), "Meta")
