"""Gradients of a tensor's parts are stacked, where each part was taken by its number.

`q, k, v = qkv[0], qkv[1], qkv[2]` has a gradient that torch makes of three tensors of the whole
size, each zero but for its part, and their sums. No sum mixes two parts: they lie side by side.
What the products for the gradients of inputs and weights read of the stack is kept as one tensor:
XLA's TPU compiler else rearranges it for each of them, by way of `[..., 3, heads, 32]`, which in
tiles of 4 x 128 numbers is mostly padding. Exact but for the sign of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from runner.backends.passes.operands import VIEWS, keep, products

_aten = torch.ops.aten
_REARRANGED = (*VIEWS, _aten.clone.default)
_ADD, _PART = _aten.add.Tensor, _aten.select_backward.default


def stack_parts(graph: fx.Graph) -> int:
    """Stacks what such sums add up, where every part has one gradient.

    Returns:
        How many sums were replaced.
    """
    summed = _sums_of_parts(graph)
    count = 0
    for node, parts in summed.items():
        if any(user in summed for user in node.users):
            continue
        _, size, dim, _ = parts[0].args
        each = {part.args[3]: part.args[0] for part in parts}
        if len(each) == len(parts) == size[dim]:
            with graph.inserting_before(node):
                ordered = [each[place] for place in range(len(parts))]
                stacked = graph.call_function(_aten.stack.default, (ordered, dim))
            stacked.meta = {**node.meta}
            node.replace_all_uses_with(stacked)
            _keep_rearranged(graph, stacked)
            count += 1
    graph.eliminate_dead_code()
    return count


def _sums_of_parts(graph: fx.Graph) -> dict[fx.Node, list[Any]]:
    """Gradients of parts, and sums of nothing else, to what is summed: of one tensor's shape."""
    found: dict[fx.Node, list[Any]] = {}
    for node in graph.nodes:
        if node.target is _PART:
            found[node] = [node]
        elif node.target is _ADD and not node.kwargs and all(one in found for one in node.args):
            parts = [part for one in node.args for part in found[one]]
            if len({(tuple(part.args[1]), part.args[2]) for part in parts}) == 1:
                found[node] = parts
    return found


def _keep_rearranged(graph: fx.Graph, node: fx.Node) -> None:
    """Keeps what becomes of a node by views and copies, if several products read it."""
    while [user.target in _REARRANGED for user in node.users] == [True]:
        node = next(iter(node.users))
    if products(node) > 1:
        keep(graph, node)
