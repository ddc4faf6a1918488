"""Trace gradients and updates apart, where the optimizer lets them, and join the graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from runner.backends.step.sharing import GraphBuilder, share_equal_inputs
from runner.backends.step.trace import in_haste, trace_unwritten
from runner.backends.step.updates import Updates
from runner.xla.autocast import switched_off

if TYPE_CHECKING:
    from runner.backends.step.function import StepFunction

GraphModule = torch.fx.GraphModule
Node = torch.fx.Node


@in_haste()
def trace_whole(
    traced: StepFunction, inputs: Sequence[torch.Tensor], *, equal: Sequence[Sequence[int]]
) -> tuple[GraphModule, dict[int, int]]:
    """Traces a step to a graph that carries equal state once.

    Args:
        traced: The step.
        inputs: Example inputs in its order.
        equal: Positions of carried tensors that hold equal values, group by group.

    Returns:
        A graph that computes what `traced` does, with a placeholder for every input, and the
        inputs that it does not read: position to the position that stands for it.
    """
    with traced.passes.rewriting(), switched_off():
        updates = Updates(traced, inputs) if traced.functional.independent else None
        whole = None if updates else trace_unwritten(traced, inputs, decomposed=traced.decomposed)

    def build(merged: Mapping[int, int]) -> tuple[GraphBuilder, Sequence[Any]]:
        builder = GraphBuilder()
        places = builder.places(len(inputs), merged)
        if updates is not None:
            return builder, updates.splice(builder, places)
        assert whole is not None
        return builder, builder.append(whole, places)

    output_of = {position: position + 2 for position in range(len(traced.initial))}
    graph, merged = share_equal_inputs(build, equal, output_of=output_of)
    traced.passes.improve(graph)
    return graph, merged
