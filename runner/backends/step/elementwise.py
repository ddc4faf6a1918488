"""Whether a graph treats each element of its tensors alone, and all alike."""

from __future__ import annotations

import torch
from torch import fx

from runner.backends.step.random import draws

_aten = torch.ops.aten
_COPIES = {
    _aten._to_copy.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.alias.default,
}


def is_elementwise(graph: fx.GraphModule, shape: torch.Size) -> bool:
    """Whether it does, its tensors being of one shape or scalars."""
    for node in graph.graph.nodes:
        if node.op == "call_function":
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            alone = pointwise or node.target in _COPIES
            if not alone or draws(node.target):
                return False
            if node.meta["val"].shape not in (shape, torch.Size(())):
                return False
    return True
