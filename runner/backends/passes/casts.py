"""Remove casts that change nothing: to the type that is there, and there and back by a wider one.

Exact: every number of a narrower type is a number of the wider one.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

CAST = torch.ops.aten._to_copy.default
LOW = (torch.bfloat16, torch.float16)


def shorten_casts(graph: fx.Graph) -> int:
    """Lets each cast read the first tensor of its chain that holds the same numbers.

    Returns:
        How many casts were removed or shortened.
    """
    count = 0
    for node in list(graph.nodes):
        source = source_of(node)
        if source is None:
            continue
        origin = source_of(source)
        widened = origin is not None and _widens(dtype_of(origin), dtype_of(source))
        if origin is not None and widened:
            node.args, source = (origin,), origin
            count += 1
        if dtype_of(source) == node.kwargs["dtype"]:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            count += not widened
    graph.eliminate_dead_code()
    return count


def source_of(node: fx.Node) -> fx.Node | None:
    """What a node casts, if it changes the type and nothing else."""
    if node.target is not CAST or set(node.kwargs) != {"dtype"}:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and dtype_of(source) is not None else None


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The type of a node's tensor, if it is one."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def cast_behind(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A cast of a node's tensor, which nothing reads yet."""
    with graph.inserting_after(node):
        cast: fx.Node = graph.call_function(CAST, (node,), {"dtype": dtype})
    cast.meta = {**node.meta, "val": _described(node.meta["val"], dtype)}
    return cast


def round_behind(graph: fx.Graph, node: fx.Node, *, small: bool) -> None:
    """Rounds what a node made in a low precision behind it, now that it makes float32.

    A cast to float32 reads it unrounded: any such cast where the tensor is `small`, else one that
    is its only reader, since what several read would lie in memory in float32.
    """
    low = node.meta["val"].dtype
    users = list(node.users)
    node.meta = {**node.meta, "val": _described(node.meta["val"], torch.float32)}
    rounded = cast_behind(graph, node, low)
    for user in users:
        wide = user.target is CAST and user.kwargs == {"dtype": torch.float32}
        if not wide or (len(users) > 1 and not small):
            user.replace_input_with(node, rounded)
    if not rounded.users:
        graph.erase_node(rounded)


def _described(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A node's tensor in another type: in no trace that goes on around that of the graph."""
    with _disable_current_modes():
        return value.to(dtype)


def _widens(narrow: torch.dtype | None, wide: torch.dtype | None) -> bool:
    """Whether floats of a type are all floats of another."""
    if narrow is None or wide is None:
        return False
    floats = narrow.is_floating_point and wide.is_floating_point
    return floats and torch.promote_types(narrow, wide) == wide
