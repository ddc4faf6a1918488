"""What several matrix products read is computed before them, once.

Left to itself XLA's TPU compiler computes it in each of the products, which by its own estimate
costs more. Under autocast there are three such cases:

- A sum in float32 that is added to further, such as the gradient of a residual stream, and that
  products read in bf16.
- Where a layer scales what it adds to the stream, the stream's gradient times the scale, which a
  bias' gradient reads, too.
- Gradients that are made, element by element, from one that a product gives, where several are:
  those of a gated feed-forward layer's two factors. Not in graphs that compute layers again or
  accumulate gradients, whose forward and backward passes cannot be told apart, nor in loops over
  layers.

Values do not change.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Container, Iterator

import torch
from torch import fx

from runner.backends.passes.casts import CAST, LOW, dtype_of, source_of
from runner.xla.barrier import BARRIER

_aten = torch.ops.aten
_SUM = _aten.sum.dim_IntList
_PRODUCTS = (_aten.addmm.default, _aten.bmm.default, _aten.mm.default)
#: What gives the same numbers another shape.
VIEWS = (
    _aten._unsafe_view.default,
    _aten.permute.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.view.default,
)
_MOVES = (*VIEWS, CAST, _aten.clone.default)


def keep_operands(graph: fx.Graph) -> int:
    """Keeps XLA from computing such an operand in each of the products.

    Args:
        graph: Of a training step, its first output the loss; or of a part of one.

    Returns:
        How many are computed once.
    """
    count, nodes = 0, list(graph.nodes)
    forward = set(nodes) if _has_several_passes(graph) else _needed(graph)
    for node in nodes:
        if dtype_of(node) not in LOW or products(node) < 2:
            continue
        if _is_rounded_often(node) or (node not in forward and _shares_a_product(node, forward)):
            keep(graph, node)
            count += 1
    return count


def _has_several_passes(graph: fx.Graph) -> bool:
    """Whether barriers hold back layers that are computed again, or a further micro-batch."""
    barriers = graph.find_nodes(op="call_function", target=BARRIER)
    return any(len(barrier.all_input_nodes) > 1 for barrier in barriers)


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """The first output, and everything that it is computed from."""
    left = graph.output_node().all_input_nodes[:1]
    found = set(left)
    while left:
        new = [one for one in left.pop().all_input_nodes if one not in found]
        found.update(new)
        left += new
    return found


def _shares_a_product(node: fx.Node, forward: Container[fx.Node]) -> bool:
    """Whether it is made element by element from a product's result that others are made from, too.

    If nothing else reads that result, XLA computes the node at the end of the product, and once.
    """
    if not _is_elementwise(_made_by(node)):
        return False
    left = [node]
    reads: collections.Counter[fx.Node] = collections.Counter()
    while left:
        for one in left.pop().all_input_nodes:
            reads[one] += 1
            if reads[one] == len(one.users) and _is_elementwise(one):
                left.append(one)
    others = (one for one in reads if one not in forward and reads[one] < len(one.users))
    return any(_made_by(one).target in _PRODUCTS and _same_size(one, node) for one in others)


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in _MOVES


def _made_by(node: fx.Node) -> fx.Node:
    """The operation behind a node, past casts, copies and other shapes."""
    while node.target in _MOVES:
        (node,) = node.all_input_nodes
    return node


def _same_size(one: fx.Node, other: fx.Node) -> bool:
    """Whether one is not broadcast to become the other."""
    return bool(one.meta["val"].numel() == other.meta["val"].numel())


def _is_rounded_often(node: fx.Node) -> bool:
    source = source_of(node)
    if source is None or dtype_of(source) != torch.float32:
        return False
    if source.target is _aten.mul.Tensor and _is_scaled(source):
        return any(reader.target is _SUM for reader in _readers(node))
    return source.target is _aten.add.Tensor and len(source.users) > 1


def _is_scaled(product: fx.Node) -> bool:
    """Whether one factor is smaller than the product, or an input, whose size no node tells."""
    whole = product.meta["val"].shape
    factors = product.all_input_nodes
    return any(dtype_of(one) is None or one.meta["val"].shape != whole for one in factors)


def products(node: fx.Node) -> int:
    """How many matrix products read a node's numbers."""
    return sum(reader.target in _PRODUCTS for reader in _readers(node))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What computes with a node's numbers, of whatever shape."""
    for user in node.users:
        if user.target in VIEWS:
            yield from _readers(user)
        else:
            yield user


def keep(graph: fx.Graph, node: fx.Node) -> None:
    """Puts a barrier behind a node, so that XLA makes its tensor once and for all its readers."""
    users = list(node.users)
    with graph.inserting_after(node):
        held = graph.call_function(BARRIER, ([node],))
    held.meta = {**node.meta, "val": [node.meta["val"]]}
    with graph.inserting_after(held):
        value = graph.call_function(operator.getitem, (held, 0))
    value.meta = {**node.meta}
    for user in users:
        user.replace_input_with(node, value)
