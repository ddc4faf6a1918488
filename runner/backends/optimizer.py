"""Optimizers before their first step: any `torch.optim` class, its state made up front.

State that is made inside the first step changes the graph of the second one, which is then
compiled again. So the first step is rehearsed on the host with zero gradients, and what the
optimizer first stored under each key is kept: that is its true initial state, whatever it
is (Adam's zeros, Rprop's step size, NAdam's product of one).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _FirstValues(dict[str, Any]):
    """A parameter's state that remembers the first value stored under each key."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = value.clone() if isinstance(value, Tensor) else copy.copy(value)
        super().__setitem__(key, value)


def make_initial_state(optimizer: Optimizer) -> None:
    """Give every parameter the state that the optimizer would make in its first step.

    Args:
        optimizer: A new optimizer over parameters on the host; these keep their values.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values = [param.detach().clone() for param in params]
    rehearsed = {param: _FirstValues() for param in params if not optimizer.state.get(param)}
    optimizer.state.update(rehearsed)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    for param, state in rehearsed.items():
        optimizer.state[param] = {
            key: torch.zeros_like(param) if key == "momentum_buffer" else first
            for key, first in state.first.items()
        }


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's `lr_scale`.

    torch_xla builds the numbers 0, 1 and -1 into a graph and hands all others to it, so a
    rate that passes through 1 would recompile. The next smaller double is no such number,
    and is 1 again in float32.
    """
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        group["lr"] = math.nextafter(rate, 0.0) if rate == 1.0 else rate
