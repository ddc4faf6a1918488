"""Trace the gradients once and each kind of parameter update once, and join the graphs.

Most of a step's traced ops are the same update repeated for every parameter. Where an optimizer
updates each parameter alone, parameters of one shape share one trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from runner.backends.step.sharing import GraphBuilder, share_equal_inputs
from runner.backends.step.trace import trace_unwritten

if TYPE_CHECKING:
    from runner.backends.step.function import StepFunction

GraphModule = torch.fx.GraphModule
Node = torch.fx.Node


def trace_whole(
    traced: StepFunction, inputs: Sequence[torch.Tensor], *, equal: Sequence[Sequence[int]]
) -> tuple[GraphModule, dict[int, int]]:
    """Traces a step to a graph that carries equal state once.

    Args:
        traced: The step.
        inputs: Example inputs in its order.
        equal: Positions of carried tensors that hold equal values, group by group.

    Returns:
        A graph that computes what `traced` does, with a placeholder for every input, and the
        inputs that it does not read: position to the position that stands for it.
    """
    updates = _Updates(traced, inputs) if traced.functional.independent else None
    whole = updates.gradients if updates else trace_unwritten(traced, inputs)

    def build(merged: Mapping[int, int]) -> tuple[GraphBuilder, Sequence[Any]]:
        builder = GraphBuilder()
        places = builder.places(len(inputs), merged)
        if updates is not None:
            return builder, updates.splice(builder, places)
        return builder, builder.append(whole, places)

    output_of = {position: position + 2 for position in range(len(traced.initial))}
    return share_equal_inputs(build, equal, output_of=output_of)


class _Updates:
    """The gradients, and each kind of update, traced once.

    Attributes:
        gradients: Loss, norm, the model's other tensors and gradients.
    """

    def __init__(self, traced: StepFunction, inputs: Sequence[torch.Tensor]) -> None:
        self._traced, self._inputs = traced, inputs
        self._kinds: dict[object, GraphModule] = {}
        self._held, self._carried = len(traced.names), len(traced.initial)
        self._slots: list[list[int]] = [[] for _ in range(traced.trainable)]
        for offset, slot in enumerate(traced.functional.slots):
            self._slots[slot.parameter].append(self._held + offset)
        self.gradients = trace_unwritten(traced.gradients, self._of_gradients(inputs))

    def _of_gradients(self, flat: Sequence[Any]) -> list[Any]:
        """The inputs of the gradients: model and batch."""
        return [*flat[: self._held], *flat[self._carried + self._traced.groups :]]

    def splice(self, builder: GraphBuilder, places: Sequence[Node]) -> list[Any]:
        """Appends gradients and all updates; returns the nodes of the step's outputs."""
        outputs = builder.append(self.gradients, self._of_gradients(places))
        fixed = self._held - self._traced.trainable
        loss, norm, model_rest = outputs[0], outputs[1], outputs[2 : 2 + fixed]
        new = list(places)
        for index, gradient in enumerate(outputs[2 + fixed :]):
            if gradient is None:
                continue
            group = self._traced.functional.group_of(index)
            own = [index, *self._slots[index]]
            rate = places[self._carried + group]
            arguments = [places[index], gradient, rate, *(places[i] for i in own[1:])]
            updated = builder.append(self._kind(index, group), arguments)
            for position, output in zip(own, updated, strict=True):
                new[position] = output
        parameters = new[: self._traced.trainable]
        return [loss, norm, *parameters, *model_rest, *new[self._held : self._carried]]

    def _kind(self, index: int, group: int) -> GraphModule:
        value, rate = self._inputs[index], self._inputs[self._carried + group]
        state = [self._inputs[i] for i in self._slots[index]]
        tensors = [value, value, rate, *state]
        kind = (group, tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors))
        if kind not in self._kinds:
            self._kinds[kind] = trace_unwritten(
                lambda *flat: self._traced.functional.step_one(index, flat), tensors
            )
        return self._kinds[kind]
