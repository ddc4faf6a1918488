"""Layers that repeat: the one place that decides how a stack of them is run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn


class CallLayer(Protocol):
    """Calls one layer of a stack, in a way of the runner's choice."""

    def __call__(
        self, call: Callable[..., Any], layer: nn.Module, x: Tensor, *shared: Tensor
    ) -> Tensor: ...


# A plain global, which dynamo can read: a ContextVar would break its graph at every stack.
_caller: CallLayer | None = None


@contextlib.contextmanager
def layers_called_by(caller: CallLayer) -> Iterator[None]:
    """Within it, every layer of `run_layers` is called by `caller`."""
    global _caller
    before, _caller = _caller, caller
    try:
        yield
    finally:
        _caller = before


def run_layers(
    layers: Iterable[nn.Module],
    x: Tensor,
    *shared: Tensor,
    call: Callable[..., Any] = nn.Module.__call__,
) -> Tensor:
    """Hand `x` through layers of one kind, each from and to the same shape.

    Args:
        layers: Modules of one class whose parameters have the same names and shapes. What is
            trained and not a layer's own must come to it as an input.
        x: The first layer's input.
        shared: Further inputs that are the same for every layer.
        call: From a layer, its input and `shared` to its output, where a library's layers want
            their inputs by name or give more than one output.
    """
    caller = _caller
    for layer in layers:
        x = call(layer, x, *shared) if caller is None else caller(call, layer, x, *shared)
    return x


class Stack(nn.Sequential):
    """A stack that takes the place of a library's `nn.Sequential`, under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        """The input handed through every layer."""
        return run_layers(self, x)
