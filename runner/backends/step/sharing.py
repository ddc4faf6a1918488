"""Find state that can never differ, and carry it once.

An optimizer counts steps once per parameter: 62 scalars for a ResNet-18, each with its own bias
correction. Where such scalars start equal and the graph maps equal values to equal values, one of
them stands for all. Owns: that proof by common subexpressions, and the smaller graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

Node = torch.fx.Node


def share_equal_inputs(
    graph_module: torch.fx.GraphModule,
    groups: Sequence[Sequence[int]],
    *,
    output_of: Mapping[int, int],
) -> tuple[torch.fx.GraphModule, dict[int, int]]:
    """Merges inputs that are equal now and that the graph keeps equal.

    Args:
        graph_module: A functional graph with one placeholder per input.
        groups: Positions of inputs that hold equal values before the first call.
        output_of: Input position to the position of the output that replaces it next call.

    Returns:
        A graph with the same placeholders and without common subexpressions, and the merged
        inputs: position to the position that stands for it. A merged input is no longer read.
    """
    tried = [list(group) for group in groups if len(group) > 1]
    while True:
        merged = {other: group[0] for group in tried for other in group[1:]}
        smaller, outputs = _without_repeats(graph_module.graph, merged)
        kept = [
            group
            for group in tried
            if len({id(outputs[output_of[position]]) for position in group}) == 1
        ]
        if len(kept) == len(tried):
            smaller.eliminate_dead_code()
            return torch.fx.GraphModule(graph_module, smaller), merged
        tried = kept


def _without_repeats(
    graph: torch.fx.Graph, merged: Mapping[int, int]
) -> tuple[torch.fx.Graph, Sequence[Any]]:
    new = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    seen: dict[Hashable, Node] = {}
    inputs: list[Node] = []
    outputs: Any = ()
    for node in graph.nodes:
        if node.op == "placeholder":
            copy = new.node_copy(node)
            inputs.append(copy)
            copies[node] = inputs[merged.get(len(inputs) - 1, len(inputs) - 1)]
            continue
        key = _key(node, copies)
        if key is not None and key in seen:
            copies[node] = seen[key]
            continue
        copy = new.node_copy(node, copies.__getitem__)
        copies[node] = copy
        if key is not None:
            seen[key] = copy
        if node.op == "output":
            outputs = copy.args[0]
    return new, outputs


def _key(node: Node, copies: Mapping[Node, Node]) -> Hashable | None:
    if node.op == "get_attr":
        return (node.op, node.target)
    if node.op != "call_function" or _draws(node.target):
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


def _draws(target: Any) -> bool:
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
    )
