"""Sums and means of bf16 tensors are taken in float32 and then rounded once.

Autocast leaves them in bf16: a bias' gradient over all tokens, the average over an image. At
least as exact as without; where the result is cast to float32 anyway it is not rounded at all.
"""

from __future__ import annotations

import torch
from torch import fx

from runner.backends.passes.casts import LOW, dtype_of, round_behind

_aten = torch.ops.aten
_SUMS = (_aten.sum.dim_IntList, _aten.sum.default, _aten.mean.dim, _aten.mean.default)


def widen_sums(graph: fx.Graph) -> int:
    """Gives each sum of a low precision a float32 result and casts that.

    Returns:
        How many sums were widened.
    """
    count = 0
    for node in list(graph.nodes):
        if node.target in _SUMS and not node.kwargs.get("dtype") and dtype_of(node) in LOW:
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
            round_behind(graph, node, small=True)
            count += 1
    return count
