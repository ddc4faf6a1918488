"""Layers that repeat: the one place that decides how a stack of them is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def run_layers(
    layers: Iterable[nn.Module],
    x: Tensor,
    *shared: Tensor,
    call: Callable[..., Any] = nn.Module.__call__,
) -> Tensor:
    """Hand `x` through layers of one kind, each from and to the same shape.

    Args:
        layers: Modules of one class whose parameters have the same names and shapes.
        x: The first layer's input.
        shared: Further inputs that are the same for every layer.
        call: From a layer, its input and `shared` to its output, where a library's layers want
            their inputs by name or give more than one output.
    """
    for layer in layers:
        x = call(layer, x, *shared)
    return x


class Stack(nn.Sequential):
    """A stack that takes the place of a library's `nn.Sequential`, under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        """The input handed through every layer."""
        return run_layers(self, x)
