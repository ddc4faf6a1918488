"""Optimizers before their first step and between steps: any `torch.optim` class, unmodified.

State that is made inside the first step changes the graph of the second one, which is then
compiled again. So the first step is rehearsed on the host with zero gradients, and what the
optimizer first stored under each key is kept: that is its true initial state, whatever it
is (Adam's zeros, Rprop's step size, NAdam's product of one).
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from runner.record.errors import ConfigError

# Weight decay would put decay times parameter into SGD's first momentum; on the host an optimizer
# refuses to be capturable.
_REHEARSED = {"weight_decay": 0.0, "capturable": False}


class UnsupportedOptimizerError(ConfigError):
    """The optimizer keeps something between steps that a compiled program cannot carry."""


class _FirstValues(dict[str, Any]):
    """A state dict of one parameter that keeps a copy of the first value given to each key."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = value.clone() if isinstance(value, torch.Tensor) else value
        super().__setitem__(key, value)


def initial_state(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """Returns what the optimizer would put into its state at its first step, before it counts.

    One step with zero gradients, at the rates that the optimizer was made with, runs on copies
    in host memory; neither the parameters nor the optimizer change. State that exists
    already (a resumed optimizer) is kept as it is.

    Args:
        optimizer: Any optimizer whose state is a dict per parameter.

    Returns:
        Parameter to state; tensors are on the parameter's device, scalars included.

    Raises:
        UnsupportedOptimizerError: State that is a changing Python number, or whose absence means
            something that no first value can stand for.
    """
    _refuse_meaningful_absence(optimizer)
    trainable = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    chosen = {_kind(optimizer, p): p for p in reversed(trainable)}
    copies = {p: p.detach().to("cpu", copy=True) for p in chosen.values()}
    recorded: defaultdict[torch.Tensor, _FirstValues] = defaultdict(_FirstValues)
    for parameter, copy in copies.items():
        copy.grad = torch.zeros_like(copy)
        for key, value in optimizer.state.get(parameter, {}).items():
            recorded[copy][key] = _on(value, "cpu")
    with lent(optimizer, copies, recorded, options=known_options(optimizer, _REHEARSED)):
        optimizer.step()
    return {
        p: _checked_first_values(recorded[copies[chosen[_kind(optimizer, p)]]], p.device)
        for p in trainable
    }


def independent(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each parameter's update reads nothing of the other parameters, as in torch.optim."""
    return type(optimizer).__module__.startswith("torch.optim")


def _kind(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> object:
    """Returns what decides a parameter's first state: its own, or the shape and the group."""
    if optimizer.state.get(parameter) or not independent(optimizer):
        return id(parameter)
    groups = enumerate(optimizer.param_groups)
    group = next(g for g, group in groups if any(parameter is p for p in group["params"]))
    return group, tuple(parameter.shape), parameter.stride(), parameter.dtype


def _on(value: Any, device: torch.device | str) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, torch.Tensor) else value


def _checked_first_values(state: _FirstValues, device: torch.device) -> dict[str, Any]:
    for key, first in state.first.items():
        if not isinstance(first, torch.Tensor) and first is not None and state[key] != first:
            raise UnsupportedOptimizerError(
                f"optimizer state {key!r} is a Python {type(first).__name__} that changes every "
                f"step ({first} to {state[key]}); it would be fixed in the program: keep it in a "
                "0-d tensor"
            )
    return {key: _on(value, device) for key, value in state.first.items()}


def _refuse_meaningful_absence(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"] and group["dampening"]:
            raise UnsupportedOptimizerError(
                "optim.options.dampening must be 0: SGD does not dampen its first step, so that "
                f"step would be a program of its own; got {group['dampening']}"
            )


def known_options(
    optimizer: torch.optim.Optimizer, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each parameter group, those of the options that it has."""
    return [{k: v for k, v in options.items() if k in g} for g in optimizer.param_groups]


@contextlib.contextmanager
def lent(
    optimizer: torch.optim.Optimizer,
    stand_ins: dict[torch.Tensor, torch.Tensor],
    state: Any,
    *,
    options: Sequence[dict[str, Any]] = (),
) -> Iterator[None]:
    """Points an optimizer at other tensors for a moment."""
    own_state, own_groups = optimizer.state, [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.state = state
        for index, group in enumerate(optimizer.param_groups):
            group["params"] = [stand_ins[p] for p in group["params"] if p in stand_ins]
            group.update(options[index] if options else {})
        yield
    finally:
        optimizer.state = own_state
        for group, own in zip(optimizer.param_groups, own_groups, strict=True):
            group.clear()
            group.update(own)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's `lr_scale`.

    torch_xla builds the numbers 0, 1 and -1 into a graph and hands all others to it, so a
    rate that passes through 1 would recompile. The next smaller double is no such number,
    and is 1 again in float32.
    """
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        group["lr"] = math.nextafter(rate, 0.0) if rate == 1.0 else rate
