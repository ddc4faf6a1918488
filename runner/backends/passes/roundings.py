"""Sums of what has just been computed in float32, and activations, are rounded once.

As it stands each of torch's operations rounds its result: a norm's output before the residual is
added to it, a norm's gradient before it meets another one; and XLA makes several operations of an
activation such as GELU, and rounds after each. At least as exact as without, and what the norms
pass rounds more in a residual network is won back here. No tensor in memory becomes wider: what
is not rounded is read by one operation alone, which XLA computes in the same loop. A bias is
rounded before it is added, as a weight is.
"""

from __future__ import annotations

import torch
from torch import fx

from runner.backends.passes.casts import LOW, cast_behind, dtype_of, round_behind, source_of

_aten = torch.ops.aten
#: Of several operations in XLA. The gradients of elu, mish and silu come as several already.
_ACTIVATIONS = (
    _aten.elu.default,
    _aten.gelu.default,
    _aten.gelu_backward.default,
    _aten.hardswish.default,
    _aten.hardswish_backward.default,
    _aten.mish.default,
    _aten.silu.default,
)
_SUMS = (_aten.add.Tensor, _aten.sub.Tensor)
_RELU = _aten.relu.default
_MASK = _aten.threshold_backward.default


def round_once(graph: fx.Graph) -> int:
    """Computes these in float32 and rounds the result.

    Returns:
        How many operations were widened.
    """
    count = 0
    for node in list(graph.nodes):
        if dtype_of(node) in LOW and _is_widened(node):
            for operand in node.all_input_nodes:
                if dtype_of(operand) in LOW:
                    node.replace_input_with(operand, _wide(graph, operand, node))
            round_behind(graph, node, small=False)
            count += 1
    graph.eliminate_dead_code()
    return count


def _is_widened(node: fx.Node) -> bool:
    if node.target in _ACTIVATIONS:
        return True
    found = any(_unrounded(one, node) for one in node.all_input_nodes)
    return found and (node.target in _SUMS or (node.target is _RELU and _goes_into_a_sum(node)))


def _goes_into_a_sum(node: fx.Node) -> bool:
    readers = _readers(node)
    return len(readers) == 1 and readers[0].target in _SUMS


def _unrounded(operand: fx.Node, node: fx.Node) -> fx.Node | None:
    """The float32 tensor that an operand rounds for this node alone, if it is as large."""
    source = source_of(operand)
    if source is None or dtype_of(source) != torch.float32 or _readers(operand) != [node]:
        return None
    return source if source.meta["val"].shape == node.meta["val"].shape else None


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a node's numbers: more than whether they are positive."""
    masked = [user for user in node.users if user.target is _MASK and user.args[1] is node]
    return [user for user in node.users if user not in masked or user.args[0] is node]


def _wide(graph: fx.Graph, operand: fx.Node, node: fx.Node) -> fx.Node:
    return _unrounded(operand, node) or cast_behind(graph, operand, torch.float32)
