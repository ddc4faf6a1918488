"""Let an optimizer make its first state for tensors that have no data.

The state's tensors are described, too; but for its single numbers, whose values decide which
of them a program carries once, values are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from runner.backends.step.optimizer import traceable

_FILLED = {torch.zeros: 0.0, torch.ones: 1.0}


class DescribedState(TorchFunctionMode):
    """While active beside a `FakeTensorMode`, 0-d tensors made of a number keep it.

    Fake tensors remember the values of `torch.tensor`, not those of `torch.zeros`.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func in _FILLED and tuple(args) == ((),):
            return torch.tensor(_FILLED[func], **options)
        return func(*args, **options)


def described_optimizer(
    make: Callable[[nn.Module], Optimizer],
) -> Callable[[nn.Module], Optimizer]:
    """`make`, what it makes able to take a step without asking a tensor for its value."""

    def made(module: nn.Module) -> Optimizer:
        optimizer = make(module)
        step = optimizer.step

        def described_step(*arguments: Any) -> Any:
            with traceable(optimizer):
                return step(*arguments)

        setattr(optimizer, "step", described_step)  # noqa: B010 - mypy knows step's overloads
        return optimizer

    return made
