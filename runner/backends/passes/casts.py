"""Remove casts that change nothing: to the type that is there, and there and back by a wider one.

Exact: every number of a narrower type is a number of the wider one.
"""

from __future__ import annotations

import torch
from torch import fx

_CAST = torch.ops.aten._to_copy.default


def shorten_casts(graph: fx.Graph) -> int:
    """Lets each cast read the first tensor of its chain that holds the same numbers.

    Returns:
        How many casts were removed or shortened.
    """
    count = 0
    for node in list(graph.nodes):
        source = _source(node)
        if source is None:
            continue
        origin = _source(source)
        widened = origin is not None and _widens(_dtype(origin), _dtype(source))
        if origin is not None and widened:
            node.args, source = (origin,), origin
            count += 1
        if _dtype(source) == node.kwargs["dtype"]:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            count += not widened
    graph.eliminate_dead_code()
    return count


def _source(node: fx.Node) -> fx.Node | None:
    """What a node casts, if it changes the type and nothing else."""
    if node.target is not _CAST or set(node.kwargs) != {"dtype"}:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and _dtype(source) is not None else None


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _widens(narrow: torch.dtype | None, wide: torch.dtype | None) -> bool:
    """Whether floats of a type are all floats of another."""
    if narrow is None or wide is None:
        return False
    floats = narrow.is_floating_point and wide.is_floating_point
    return floats and torch.promote_types(narrow, wide) == wide
