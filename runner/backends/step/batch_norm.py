"""Give BatchNorm's running variance torch's unbiased estimate.

torch_xla's lowering keeps the biased one: 1/(n-1) too small, in lazy tensors too. Losses in
training do not show it; evaluation does.
"""

from __future__ import annotations

import math
import operator

import torch
import torch.fx

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default
_RUNNING_VARIANCE = 4


def unbias_running_variance(graph: torch.fx.Graph) -> None:
    """Corrects every training BatchNorm of a functional graph in place."""
    for node in list(graph.nodes):
        if node.target is not operator.getitem or node.args[1] != _RUNNING_VARIANCE:
            continue
        norm = node.args[0]
        if norm.target is _BATCH_NORM and norm.args[5]:
            _correct(graph, node, norm)


def _correct(graph: torch.fx.Graph, node: torch.fx.Node, norm: torch.fx.Node) -> None:
    values, old, momentum = norm.args[0], norm.args[4], norm.args[6]
    assert isinstance(values, torch.fx.Node)
    assert isinstance(momentum, float)
    shape = values.meta["val"].shape
    samples = math.prod(shape) // int(shape[1])
    factor = samples / max(samples - 1, 1)
    users = list(node.users)
    with graph.inserting_after(node):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
    with graph.inserting_after(scaled):
        # factor * ((1 - m) * old + m * var) - (factor - 1) * (1 - m) * old
        kept = graph.call_function(
            torch.ops.aten.mul.Tensor, (old, (factor - 1.0) * (1.0 - momentum))
        )
    with graph.inserting_after(kept):
        result = graph.call_function(torch.ops.aten.sub.Tensor, (scaled, kept))
    for user in users:
        user.replace_input_with(node, result)
