"""The dynamo bridge: from an FX graph to an XLA program.

Source: `torch_xla/_dynamo/dynamo_bridge.py` (torch_xla 2.9.0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    seed = binding._xla_get_rng_seed()
    compiled: CompiledGraph = dynamo_bridge.extract_compiled_graph(graph, tuple(inputs))
    binding._xla_set_rng_seed(seed)
    return compiled
