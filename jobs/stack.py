"""Layers that repeat: the one place that decides how a stack of them is run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn


class CallLayer(Protocol):
    """Calls one layer of a stack, in a way of the runner's choice."""

    def __call__(
        self, call: Callable[..., Any], layer: nn.Module, x: Tensor, *shared: Tensor
    ) -> Tensor: ...


def _directly(call: Callable[..., Any], layer: nn.Module, x: Tensor, *shared: Tensor) -> Tensor:
    output: Tensor = call(layer, x, *shared)
    return output


_call_layer: ContextVar[CallLayer] = ContextVar("call_layer", default=_directly)


@contextlib.contextmanager
def layers_called_by(caller: CallLayer) -> Iterator[None]:
    """Within it, every layer of `run_layers` is called by `caller`."""
    token = _call_layer.set(caller)
    try:
        yield
    finally:
        _call_layer.reset(token)


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
    call_layer = _call_layer.get()
    for layer in layers:
        x = call_layer(call, layer, x, *shared)
    return x


class Stack(nn.Sequential):
    """A stack that takes the place of a library's `nn.Sequential`, under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        """The input handed through every layer."""
        return run_layers(self, x)
