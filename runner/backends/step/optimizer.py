"""Run an unmodified `torch.optim` optimizer as a function of tensors.

Owns: which tensors an optimizer's state is made of, their first values, and lending the optimizer
traced tensors for the length of one step. Refuses to know: graphs, devices' programs, schedules.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runner.backends.step.numbers import TensorsAsNumbers, traced_extrema


class UnsupportedOptimizerError(Exception):
    """The optimizer keeps something between steps that a compiled program cannot carry."""


# Weight decay would put decay times parameter into SGD's first momentum; on the host an optimizer
# refuses to be capturable.
_PROBE = {"weight_decay": 0.0, "capturable": False}
# foreach and fused only say how an eager step launches its kernels.
_TRACED = {"capturable": True, "differentiable": False, "foreach": False, "fused": False}


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

    One step with zero gradients runs on copies in host memory; neither the parameters nor the
    optimizer change. State that exists already (a resumed optimizer) is kept as it is.

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
    with _lent(optimizer, copies, recorded, options=_known(optimizer, _PROBE)):
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
                "0-d tensor, or use backend=lazy"
            )
    return {key: _on(value, device) for key, value in state.first.items()}


def _refuse_meaningful_absence(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"] and group["dampening"]:
            raise UnsupportedOptimizerError(
                "optim.dampening must be 0 with backend=openxla_step: SGD does not dampen its "
                f"first step, so step 1 is another program; got {group['dampening']}"
            )


def _known(optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in options.items() if k in g} for g in optimizer.param_groups]


@contextlib.contextmanager
def _lent(
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


@contextlib.contextmanager
def _traceable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Lets an optimizer run on traced tensors.

    An optimizer with a `capturable` option has branches for tracing, and with torch's compiling
    flag set does not test that option against a list of devices that, for foreach, leaves XLA
    out. Without that option the flag only removes what foreach groups by (Adafactor fails).
    """
    compiling = any("capturable" in group for group in optimizer.param_groups)
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = before or compiling
    try:
        names = inspect.unwrap(type(optimizer).step).__globals__
        with traced_extrema(names), TensorsAsNumbers():
            yield
    finally:
        torch.compiler._is_compiling_flag = before


@dataclass(frozen=True)
class StateSlot:
    """One tensor of the optimizer's state: of which trainable parameter, under which key."""

    parameter: int
    key: str


class FunctionalOptimizer:
    """An optimizer as a function: parameters, gradients, state, rates -> parameters, state.

    Attributes:
        parameters: The trainable parameters, in the order of the groups.
        slots: The tensors of the state, in the order in which `step` takes and returns them.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, state: dict[torch.Tensor, dict[str, Any]]
    ) -> None:
        """Fixes the order of parameters and state.

        Args:
            optimizer: The optimizer that steps are traced through.
            state: As `initial_state` gives it.
        """
        self._optimizer = optimizer
        self._state = state
        self.parameters = list(state)
        self.slots = [
            StateSlot(index, key)
            for index, values in enumerate(state.values())
            for key, value in values.items()
            if isinstance(value, torch.Tensor)
        ]

    def step(
        self,
        parameters: Sequence[torch.Tensor],
        *,
        gradients: Sequence[torch.Tensor | None],
        state: Sequence[torch.Tensor],
        rates: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Takes one optimizer step on traced tensors.

        Args:
            parameters: Values of `self.parameters`.
            gradients: Their gradients; None where a parameter got none.
            state: Values of `self.slots`.
            rates: One 0-d float tensor per parameter group.

        Returns:
            The new parameters and the new state, in the same orders.
        """
        values = [parameter.detach().clone() for parameter in parameters]
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        lent_state = self._lent_state(values, state)
        options = _known(self._optimizer, _TRACED)
        for group_options, rate in zip(options, rates, strict=True):
            group_options["lr"] = rate
        stand_ins = dict(zip(self.parameters, values, strict=True))
        lent = _lent(self._optimizer, stand_ins, lent_state, options=options)
        with lent, _traceable(self._optimizer):
            self._optimizer.step()
        updated = [lent_state[values[slot.parameter]][slot.key] for slot in self.slots]
        return values, updated

    @property
    def independent(self) -> bool:
        """Whether parameters may be updated one by one."""
        return independent(self._optimizer)

    def step_one(self, index: int, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Takes a step of one parameter alone.

        Args:
            index: Which of `self.parameters`.
            inputs: The parameter, its gradient, its rate, then its state in slot order.

        Returns:
            The new parameter and its new state.
        """
        value, gradient, rate = inputs[0].detach().clone(), inputs[1], inputs[2]
        value.grad = gradient
        parameter = self.parameters[index]
        state = dict(self._state[parameter])
        keys = [slot.key for slot in self.slots if slot.parameter == index]
        state.update((key, tensor.clone()) for key, tensor in zip(keys, inputs[3:], strict=True))
        only = defaultdict(dict, {value: state})
        options = _known(self._optimizer, _TRACED)
        for group_options in options:
            group_options["lr"] = rate
        lent = _lent(self._optimizer, {parameter: value}, only, options=options)
        with lent, _traceable(self._optimizer):
            self._optimizer.step()
        return [value, *(state[key] for key in keys)]

    def group_of(self, index: int) -> int:
        """Returns the number of the group that a parameter is in."""
        parameter = self.parameters[index]
        groups = enumerate(self._optimizer.param_groups)
        return next(g for g, group in groups if any(parameter is p for p in group["params"]))

    def _lent_state(
        self, values: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> defaultdict[torch.Tensor, dict[str, Any]]:
        lent: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        for value, own in zip(values, self._state.values(), strict=True):
            lent[value] = dict(own)
        for slot, tensor in zip(self.slots, state, strict=True):
            lent[values[slot.parameter]][slot.key] = tensor.clone()
        return lent
