"""Find state that can never differ, and carry it once.

An optimizer counts steps once per parameter: 62 scalars for a ResNet-18, each with its own bias
correction. Where such scalars start equal and the graph maps equal values to equal values, one of
them stands for all. Owns: that proof by common subexpressions, and the smaller graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.fx._lazy_graph_module import _make_graph_module

from runner.backends.step.random import draws

Node = torch.fx.Node


class GraphBuilder:
    """A graph that grows by copies of other graphs' nodes, none of them twice."""

    def __init__(self) -> None:
        self._graph = torch.fx.Graph()
        self._owner = torch.nn.Module()
        self._seen: dict[Hashable, Node] = {}

    def places(self, count: int, merged: Mapping[int, int]) -> list[Node]:
        """Adds placeholders; returns for each input the one that stands for it."""
        own = [self._graph.placeholder(f"input_{i}") for i in range(count)]
        return [own[merged.get(i, i)] for i in range(count)]

    def append(
        self,
        part: torch.fx.GraphModule,
        arguments: Sequence[Node],
        *,
        shape: torch.Size | None = None,
    ) -> list[Any]:
        """Adds a functional graph and returns the nodes of its outputs.

        Args:
            part: What to add.
            arguments: Nodes in the place of its placeholders.
            shape: What its tensors have here, if it is elementwise; 0-d ones stay so.
        """
        given, copies = iter(arguments), {}
        for node in part.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                return list(torch.fx.map_arg(node.args[0], copies.__getitem__))
            elif node.op == "get_attr":
                copies[node] = self._constant(getattr(part, node.target))
            else:
                copies[node] = self._copy(node, copies)
                if shape is not None:
                    _reshape(copies[node], shape)
        raise AssertionError("a graph without output")

    def call(self, target: torch._ops.OpOverload[..., Any], *args: Any) -> Node:
        """Adds one functional operation."""
        return self._graph.call_function(target, args)

    def finish(self, outputs: Sequence[Any]) -> torch.fx.GraphModule:
        """The graph with these outputs and without what they do not need."""
        self._graph.output(list(outputs))
        self._graph.eliminate_dead_code()
        made: torch.fx.GraphModule = _make_graph_module(self._owner, self._graph)  # type: ignore[no-untyped-call]
        return made

    def _constant(self, value: torch.Tensor) -> Node:
        """A tensor that a part holds: a constant made inside the step."""
        key = ("constant", id(value))
        if key not in self._seen:
            name = f"constant_{len(list(self._owner.buffers()))}"
            self._owner.register_buffer(name, value)
            self._seen[key] = self._graph.get_attr(name)
        return self._seen[key]

    def _copy(self, node: Node, copies: Mapping[Node, Node]) -> Node:
        key = _key(node, copies)
        if key is None:
            return self._graph.node_copy(node, copies.__getitem__)
        if key not in self._seen:
            self._seen[key] = self._graph.node_copy(node, copies.__getitem__)
        return self._seen[key]


def _reshape(node: Node, shape: torch.Size) -> None:
    """Tells a node's shape where it is not a scalar's and not this one yet."""
    value = node.meta["val"]
    if value.dim() and value.shape != shape:
        node.meta["val"] = value.new_empty(shape)


#: From the merged inputs to a graph and the nodes of its outputs.
Build = Callable[[Mapping[int, int]], tuple[GraphBuilder, Sequence[Any]]]


def share_equal_inputs(
    build: Build, groups: Sequence[Sequence[int]], *, output_of: Mapping[int, int]
) -> tuple[torch.fx.GraphModule, dict[int, int]]:
    """Merges inputs that are equal now and that the graph keeps equal.

    Args:
        build: Builds the graph with some inputs standing for others, by position.
        groups: Positions of inputs that hold equal values before the first call.
        output_of: Input position to the position of the output that replaces it next call.

    Returns:
        A graph with a placeholder for every input and without common subexpressions, and the
        merged inputs: position to the position that stands for it. A merged input is not read.
    """
    tried = [list(group) for group in groups if len(group) > 1]
    while True:
        merged = {other: group[0] for group in tried for other in group[1:]}
        builder, outputs = build(merged)
        kept = [
            group
            for group in tried
            if len({id(outputs[output_of[position]]) for position in group}) == 1
        ]
        if len(kept) == len(tried):
            return builder.finish(outputs), merged
        tried = kept


def _key(node: Node, copies: Mapping[Node, Node]) -> Hashable | None:
    if node.op != "call_function" or draws(node.target):
        return None
    return (node.target, _frozen(node.args, copies), _frozen(node.kwargs, copies))


def _frozen(value: Any, copies: Mapping[Node, Node]) -> Hashable:
    """Returns an argument as a key: equal only for the same nodes, numbers and types."""
    if isinstance(value, Node):
        return copies[value]
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, copies) for item in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(item, copies)) for name, item in value.items())
    if isinstance(value, slice):
        return (slice, value.start, value.stop, value.step)
    return (type(value), str(value) if isinstance(value, float) else value)
