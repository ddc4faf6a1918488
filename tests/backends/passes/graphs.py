"""Functional graphs that are small enough to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from runner.backends.step.trace import trace_step


def graph_of(function: Callable[[Tensor], Sequence[Tensor]], dtype: torch.dtype) -> fx.GraphModule:
    """Of a function of one tensor [4, 6]."""
    return trace_step(function, [torch.empty(4, 6, dtype=dtype)])


def run_all(graph: fx.GraphModule, value: Tensor) -> list[Tensor]:
    """All that a graph, which may have been changed, gives for one tensor."""
    graph.recompile()
    results: list[Tensor] = graph(value)
    return results
