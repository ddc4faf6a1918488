"""The dynamo bridge: from an FX graph to an XLA program.

Source: `torch_xla/_dynamo/dynamo_bridge.py` (torch_xla 2.9.0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch_xla._dynamo import dynamo_bridge

from runner.xla.binding import binding

CompiledGraph = Callable[..., Any]


def extract(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> CompiledGraph:
    """Compile a graph for the device that its inputs are on.

    Args:
        graph: An FX graph that is functional or writes only to its inputs.
        inputs: Real XLA tensors, one for each placeholder: the bridge lowers by running.

    Returns:
        A function of as many tensors that runs the compiled program.
    """
    # Lowering runs the graph and so draws random numbers: without this, a run that compiles at
    # a step, as a resumed one does, would have another dropout mask than one that does not.
    _drop_clones(graph)
    seed = binding._xla_get_rng_seed()
    compiled: CompiledGraph = dynamo_bridge.extract_compiled_graph(graph, tuple(inputs))
    binding._xla_set_rng_seed(seed)
    return compiled


def _drop_clones(graph: fx.GraphModule) -> None:
    """Let what reads a plain copy read its source.

    Where both are outputs, as after a dropout of rate 0, the bridge takes them for one value and
    XLA for two, so that every output behind them would be another's.
    """
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.clone.default and not node.kwargs:
            source = node.args[0]
            if source.op != "placeholder":  # which the graph may write to
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)
    graph.recompile()
