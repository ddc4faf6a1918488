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


class Held:
    """Tensors of the traced step that rewrites know by identity: the parameters, or the batch."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._ids: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Takes them in the place of those held before."""
        self._held = list(tensors)
        self._ids = {id(tensor) for tensor in self._held}

    def also(self, tensors: Iterable[Tensor]) -> None:
        """Takes more of them."""
        self.hold([*self._held, *tensors])

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor is held or is a view of one that is."""
        base = tensor._base
        return id(tensor) in self._ids or (base is not None and id(base) in self._ids)


class Rewrite(abc.ABC):
    """One pass at trace time.

    Args:
        parameters: Which tensors are the model's parameters.
        batch: Which are the batch.

    Attributes:
        calls: The functions that it looks at; of `torch.nn.functional` mostly what that calls.
        count: How many calls it has rewritten.
    """

    calls: ClassVar[tuple[Function, ...]]

    def __init__(self, parameters: Held, batch: Held) -> None:
        self.parameters, self.batch = parameters, batch
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


def transformed() -> bool:
    """Whether `torch.func` transforms what is called: an autograd.Function would need rules."""
    return bool(torch._C._are_functorch_transforms_active())
