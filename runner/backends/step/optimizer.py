"""An unmodified `torch.optim` optimizer as a function of tensors.

Lends the optimizer traced tensors for the length of one step. Refuses to know: graphs, devices'
programs, schedules.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runner.backends.optimizer import independent, known_options, lent
from runner.backends.step.elementwise import is_elementwise
from runner.backends.step.numbers import TensorsAsNumbers, traced_extrema
from runner.backends.step.trace import fake_inputs, trace_unwritten

# foreach and fused only say how an eager step launches its kernels.
_TRACED = {"capturable": True, "differentiable": False, "foreach": False, "fused": False}


@contextlib.contextmanager
def traceable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
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
        optimizer: The optimizer that it is made of.
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
        self.optimizer = optimizer
        self._state = state
        self._stackable: dict[object, bool] = {}
        self.parameters = list(state)
        self.slots = [
            StateSlot(index, key)
            for index, values in enumerate(state.values())
            for key, value in values.items()
            if isinstance(value, torch.Tensor)
        ]

    @property
    def state(self) -> list[torch.Tensor]:
        """The first values of `self.slots`."""
        states = list(self._state.values())
        return [states[slot.parameter][slot.key] for slot in self.slots]

    def stacked(self, stacks: Sequence[Sequence[torch.Tensor]]) -> FunctionalOptimizer:
        """The same optimizer, of which some parameters lie on each other as [layers, ...].

        The first of such parameters stands for all; of their scalars one is kept.

        Args:
            stacks: Parameters that `may_stack` approved of; one alone is left as it is.
        """
        found = {parameter: dict(own) for parameter, own in self._state.items()}
        for members in stacks:
            states = [found[member] for member in members]
            for member in members[1:]:
                del found[member]
            for key, value in states[0].items():
                if len(members) > 1 and isinstance(value, torch.Tensor) and value.dim():
                    states[0][key] = torch.stack([own[key] for own in states])
        return FunctionalOptimizer(self.optimizer, found)

    def may_stack(self, indices: Sequence[int], device: torch.device) -> bool:
        """Whether parameters of one shape can be updated as one tensor.

        So it is where they are in one group, and each element is updated alone, and all alike.

        Args:
            indices: Which of `self.parameters`.
            device: Where they are updated.
        """
        groups = {self.group_of(index) for index in indices}
        if not self.independent or len(groups) > 1:
            return False
        first, (group,) = indices[0], groups
        parameter = self.parameters[first]
        state = [s for s in self._state[parameter].values() if isinstance(s, torch.Tensor)]
        kind = (group, tuple((one.dim() == 0, one.dtype) for one in state))
        if any(one.dim() and one.shape != parameter.shape for one in state):
            return False
        if kind not in self._stackable:
            rate = torch.zeros(())
            examples = fake_inputs([parameter, parameter, rate, *state], device)
            graph = trace_unwritten(lambda *flat: self.step_one(first, flat), examples)
            self._stackable[kind] = is_elementwise(graph, parameter.shape)
        return self._stackable[kind]

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
        stand_ins = dict(zip(self.parameters, values, strict=True))
        self._step(stand_ins, lent_state, rates)
        updated = [lent_state[values[slot.parameter]][slot.key] for slot in self.slots]
        return values, updated

    def publish(self, state: Sequence[torch.Tensor]) -> None:
        """Puts values of `self.slots` into the optimizer."""
        for parameter, values in self._state.items():
            self.optimizer.state[parameter] = dict(values)
        for slot, tensor in zip(self.slots, state, strict=True):
            self.optimizer.state[self.parameters[slot.parameter]][slot.key] = tensor.clone()

    @property
    def independent(self) -> bool:
        """Whether parameters may be updated one by one."""
        return independent(self.optimizer)

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
        rates = [rate] * len(self.optimizer.param_groups)
        self._step({parameter: value}, only, rates)
        return [value, *(state[key] for key in keys)]

    def _step(
        self,
        values: dict[torch.Tensor, torch.Tensor],
        state: defaultdict[torch.Tensor, dict[str, Any]],
        rates: Sequence[torch.Tensor],
    ) -> None:
        """One step of the optimizer, lent values for its parameters and their state."""
        options = known_options(self.optimizer, _TRACED)
        for group_options, rate in zip(options, rates, strict=True):
            group_options["lr"] = rate
        with lent(self.optimizer, values, state, options=options), traceable(self.optimizer):
            self.optimizer.step()

    def group_of(self, index: int) -> int:
        """Returns the number of the group that a parameter is in."""
        parameter = self.parameters[index]
        groups = enumerate(self.optimizer.param_groups)
        return next(g for g, group in groups if any(parameter is p for p in group["params"]))

    def _lent_state(
        self, values: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> defaultdict[torch.Tensor, dict[str, Any]]:
        held: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        for value, own in zip(values, self._state.values(), strict=True):
            held[value] = dict(own)
        for slot, tensor in zip(self.slots, state, strict=True):
            held[values[slot.parameter]][slot.key] = tensor.clone()
        return held
