"""What a pass at trace time is: another way to compute some of torch's functions.

It acts while the forward pass is traced, above autograd, so that the backward pass is that of
the new way. It sees functions and tensors, never modules: no pass knows a model.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

Function = Callable[..., Any]


class Parameters:
    """The tensors that stand for the model's parameters in the traced step."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._ids: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Name them, in the place of those named before."""
        self._held = list(tensors)
        self._ids = {id(tensor) for tensor in self._held}

    def also(self, tensors: Iterable[Tensor]) -> None:
        """Name more of them, which stand for parameters that have been named."""
        self.hold([*self._held, *tensors])

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a view of one."""
        base = tensor._base
        return id(tensor) in self._ids or (base is not None and id(base) in self._ids)


class Rewrite(abc.ABC):
    """One pass at trace time.

    Args:
        parameters: Which tensors are parameters.

    Attributes:
        calls: The functions that it looks at: torch's own, below `torch.nn.functional`.
        count: How many calls it has rewritten.
    """

    calls: ClassVar[tuple[Function, ...]]

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.count = 0

    @abc.abstractmethod
    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """A call's result: from `proceed`, the function as it was, or another way."""

    def check(self) -> None:  # noqa: B027 - most passes need nothing to act on
        """Raises a BackendError, once everything is traced, if the pass was asked for in vain."""


def autocast_type(tensor: Tensor) -> torch.dtype | None:
    """The type in which autocast computes on a tensor's device; None while it is off."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
