"""What several matrix products read is computed before them, once.

Left to itself XLA's TPU compiler computes it in each of them, which by its own estimate costs more.
Such are, under bf16: a residual stream's gradient in float32, a sum, which is added to further and
read in bf16 by the products for the gradients of inputs and weights; where a layer scales what it
adds to the stream, that gradient times the scale, which the sum for a bias' gradient reads, too;
and behind a product of two activations, as in a gated feed-forward layer, the gradients of both,
which are made of one. Exact.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Sequence

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
        graph: Its first output is the loss, where it has a backward pass.

    Returns:
        How many are computed once.
    """
    forward = _needed(graph.output_node().all_input_nodes[:1])
    count = 0
    for node in list(graph.nodes):
        if dtype_of(node) not in LOW or products(node) < 2:
            continue
        if _is_rounded_often(node) or (node not in forward and _shares_a_product(node, forward)):
            keep(graph, node)
            count += 1
    return count


def _needed(outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """All that some nodes are computed from, and these."""
    found, left = set(outputs), list(outputs)
    while left:
        new = [one for one in left.pop().all_input_nodes if one not in found]
        found.update(new)
        left += new
    return found


def _shares_a_product(node: fx.Node, forward: Container[fx.Node]) -> bool:
    """Whether it is made element by element of a gradient that others are made of, too.

    Of a gradient that a product gives. What is made of it alone XLA computes where it ends the
    product, and once.
    """
    loop, edge = {node}, node.all_input_nodes if _is_elementwise(_made_by(node)) else []
    while inner := [one for one in edge if _is_elementwise(one) and loop.issuperset(one.users)]:
        loop.update(inner)
        edge = [one for one in edge if one not in loop]
        edge += [before for one in inner for before in one.all_input_nodes]
    return any(
        _made_by(one).target in _PRODUCTS and _same_size(one, node)
        for one in edge
        if one not in forward and not loop.issuperset(one.users)
    )


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in _MOVES


def _made_by(node: fx.Node) -> fx.Node:
    """What made a node's numbers, before their shape, type or place changed."""
    while node.target in _MOVES:
        (node,) = node.all_input_nodes
    return node


def _same_size(one: fx.Node, other: fx.Node) -> bool:
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
