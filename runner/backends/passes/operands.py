"""What several matrix products read in bf16 of a float32 sum is rounded before them, once.

A residual stream in float32 has a gradient in float32, a sum, which is added to further and read in
bf16 by the products for the gradients of inputs and weights. Where a layer scales what it adds to
the stream, they read the gradient times the scale, and so does the sum for a bias' gradient. XLA's
TPU compiler takes the rounding into each of them when left to itself, and all that comes before it,
which by its own estimate costs more. Exact.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from runner.backends.passes.casts import LOW, dtype_of, source_of
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


def keep_operands(graph: fx.Graph) -> int:
    """Keeps XLA from rounding such a sum, or scaled gradient, in each of the products.

    Returns:
        How many are rounded once.
    """
    count = 0
    for node in list(graph.nodes):
        if dtype_of(node) in LOW and _is_rounded_often(node) and products(node) > 1:
            keep(graph, node)
            count += 1
    return count


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
