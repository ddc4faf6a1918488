"""Gradients of a tensor's parts are stacked, where each part was taken by its number.

`q, k, v = qkv[0], qkv[1], qkv[2]` has a gradient that torch makes of three tensors of the whole
size, each zero but for its part, and their sums. No sum mixes two parts: they lie side by side.
Where they do so in the last dimension in the end, as those of `qkv` once the heads are side by side
again, they are joined there: a TPU stores the two last dimensions in tiles of 8 x 128 numbers, so
that `[..., 3, heads, 32]` on the way would be padding for the most part. Exact but for the sign of
zeros.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

_aten = torch.ops.aten
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
            _join(graph, stacked)
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


def _join(graph: fx.Graph, stacked: fx.Node) -> None:
    """Joins the parts in the last dimension, if that is where they end up."""
    permuted: Any = _sole_user(stacked, _aten.permute.default)
    copied = _sole_user(permuted, _aten.clone.default) or permuted
    merged = _sole_user(copied, _aten._unsafe_view.default, _aten.view.default)
    if merged is None:
        return
    parts: Any = stacked.args[0]
    order = [axis % len(permuted.args[1]) for axis in permuted.args[1]]
    dim = stacked.args[1] % len(order)  # type: ignore[operator]
    *leading, last = merged.meta["val"].shape
    if last != math.prod(permuted.meta["val"].shape[order.index(dim) :]):
        return
    rest = [axis - (axis > dim) for axis in order if axis != dim]
    whole = torch.contiguous_format
    with graph.inserting_before(merged):
        flat = []
        for part in parts:
            moved = _made(graph, _aten.permute.default, part, rest)
            moved = _made(graph, _aten.clone.default, moved, memory_format=whole)
            sizes = [*leading, last // len(parts)]
            flat.append(_made(graph, _aten._unsafe_view.default, moved, sizes))
        merged.replace_all_uses_with(_made(graph, _aten.cat.default, flat, -1))


def _sole_user(node: fx.Node | None, *targets: Any) -> fx.Node | None:
    """The node that alone reads a node, if it has such a target."""
    users = [] if node is None else list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


def _made(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node, described: in no trace that goes on around that of the graph."""
    node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg(args, lambda one: one.meta["val"])
    with _disable_current_modes():
        node.meta = {"val": target(*values, **kwargs)}
    return node
