"""Trace the gradients once and each kind of parameter update once, and join the graphs.

Most of a step's traced ops are the same update repeated for every parameter. Where an optimizer
updates each parameter alone, parameters of one shape share one trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from runner.backends.step.trace import trace_step, trace_unwritten

if TYPE_CHECKING:
    from runner.backends.step.function import StepFunction

GraphModule = torch.fx.GraphModule
Node = torch.fx.Node


def trace_whole(traced: StepFunction, inputs: Sequence[torch.Tensor]) -> GraphModule:
    """Traces a step.

    Args:
        traced: The step.
        inputs: Example inputs in its order.

    Returns:
        The same graph as `trace_step(traced, inputs)` but for the names and order of its nodes.
    """
    if not traced.functional.independent:
        return trace_step(traced, inputs)
    held, count = len(traced.names), len(traced.initial)
    rates, batch = inputs[count : count + traced.groups], inputs[count + traced.groups :]
    backward = trace_unwritten(traced.gradients, [*inputs[:held], *batch])
    graph, owner = torch.fx.Graph(), torch.nn.Module()
    places = [graph.placeholder(f"input_{i}") for i in range(len(inputs))]
    loss, norm, *rest = inline(
        graph, backward, [*places[:held], *places[count + traced.groups :]], owner=owner
    )
    fixed = held - traced.trainable
    model_rest, gradients = rest[:fixed], rest[fixed:]
    updates = _Updates(traced, graph, owner=owner, inputs=inputs, places=places, rates=rates)
    parameters, state = updates.splice(gradients)
    graph.output([loss, norm, *parameters, *model_rest, *state])
    return GraphModule(owner, graph)


def inline(
    graph: torch.fx.Graph, part: GraphModule, arguments: Sequence[Node], *, owner: torch.nn.Module
) -> list[Any]:
    """Appends a functional graph and returns its outputs' nodes.

    Args:
        graph: The graph that grows.
        part: What to append.
        arguments: Nodes in the place of its placeholders.
        owner: Gets the tensors that the part holds (constants made inside the step).
    """
    given, copies = iter(arguments), {}
    for node in part.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(given)
        elif node.op == "get_attr":
            name = f"constant_{len(list(owner.buffers()))}"
            owner.register_buffer(name, getattr(part, node.target))
            copies[node] = graph.get_attr(name)
        elif node.op == "output":
            return list(torch.fx.map_arg(node.args[0], copies.__getitem__))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    raise AssertionError("a graph without output")


class _Updates:
    """The updates of a step, each kind traced once."""

    def __init__(
        self,
        traced: StepFunction,
        graph: torch.fx.Graph,
        *,
        owner: torch.nn.Module,
        inputs: Sequence[torch.Tensor],
        places: Sequence[Node],
        rates: Sequence[torch.Tensor],
    ) -> None:
        self._traced, self._graph, self._owner = traced, graph, owner
        self._inputs, self._places, self._rates = inputs, places, rates
        self._kinds: dict[object, GraphModule] = {}
        first = len(traced.names)
        slots = traced.functional.slots
        self._slots: list[list[int]] = [[] for _ in range(traced.trainable)]
        for offset, slot in enumerate(slots):
            self._slots[slot.parameter].append(first + offset)

    def splice(self, gradients: Sequence[Node | None]) -> tuple[list[Node], list[Node]]:
        """Appends all updates; returns the new parameters' and the new state's nodes."""
        new = list(self._places)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            group = self._traced.functional.group_of(index)
            rate = self._places[len(self._traced.initial) + group]
            own = [index, *self._slots[index]]
            arguments = [self._places[own[0]], gradient, rate, *(self._places[i] for i in own[1:])]
            outputs = inline(self._graph, self._kind(index, group), arguments, owner=self._owner)
            for position, output in zip(own, outputs, strict=True):
                new[position] = output
        held = len(self._traced.names)
        return new[: self._traced.trainable], new[held : len(self._traced.initial)]

    def _kind(self, index: int, group: int) -> GraphModule:
        value, rate = self._inputs[index], self._rates[group]
        state = [self._inputs[i] for i in self._slots[index]]
        tensors = [value, value, rate, *state]
        kind = (group, tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors))
        if kind not in self._kinds:
            self._kinds[kind] = trace_unwritten(
                lambda *flat: self._traced.functional.step_one(index, flat), tensors
            )
        return self._kinds[kind]
