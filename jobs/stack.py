"""Layers that repeat: the one place that decides how a stack of them is run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class RunLayers(Protocol):
    """Hands an input through layers, in a way of the runner's choice: see `run_layers`."""

    def __call__(
        self, call: Callable[..., Any], layers: Sequence[nn.Module], x: Tensor, *shared: Tensor
    ) -> Tensor: ...


# A plain global, which dynamo can read: a ContextVar would break its graph at every stack.
_run: RunLayers | None = None


@contextlib.contextmanager
def layers_run_by(run: RunLayers) -> Iterator[None]:
    """Within it, `run` does what `run_layers` is asked for."""
    global _run
    before, _run = _run, run
    try:
        yield
    finally:
        _run = before


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
    if _run is not None:
        return _run(call, list(layers), x, *shared)
    for layer in layers:
        x = call(layer, x, *shared)
    return x


class Stack(nn.Sequential):
    """A stack that takes the place of a library's `nn.Sequential`, under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        """The input handed through every layer."""
        return run_layers(self, x)
