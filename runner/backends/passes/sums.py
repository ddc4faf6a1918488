"""Sums and means of bf16 tensors are taken in float32 and then rounded once.

Autocast leaves them in bf16: a bias' gradient over all tokens, the average over an image. At
least as exact as without; where the result is cast to float32 anyway it is not rounded at all.
"""

from __future__ import annotations

import torch
from torch import fx

_aten = torch.ops.aten
_SUMS = (_aten.sum.dim_IntList, _aten.sum.default, _aten.mean.dim, _aten.mean.default)
_CAST = _aten._to_copy.default
_LOW = (torch.bfloat16, torch.float16)


def widen_sums(graph: fx.Graph) -> int:
    """Gives each sum of a low precision a float32 result and casts that.

    Returns:
        How many sums were widened.
    """
    count = 0
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target not in _SUMS or node.kwargs.get("dtype") or value is None:
            continue
        if value.dtype in _LOW:
            _widen(graph, node)
            count += 1
    return count


def _widen(graph: fx.Graph, node: fx.Node) -> None:
    value = node.meta["val"]
    users = list(node.users)
    node.kwargs = {**node.kwargs, "dtype": torch.float32}
    node.meta = {**node.meta, "val": value.float()}
    with graph.inserting_after(node):
        rounded = graph.call_function(_CAST, (node,), {"dtype": value.dtype})
    rounded.meta = {**node.meta, "val": value}
    for user in users:
        wide = user.target is _CAST and user.kwargs == {"dtype": torch.float32}
        if not wide:
            user.replace_input_with(node, rounded)
    if not rounded.users:
        graph.erase_node(rounded)
