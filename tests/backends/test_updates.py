"""The updates of all parameters from few traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor

from runner.backends.step import updates
from runner.backends.step.function import StepFunction
from runner.backends.step.splice import trace_whole
from runner.backends.step.trace import trace_unwritten
from tests.backends import problems


def spliced(make_optimizer: problems.Optim) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """A step of `TiedNet`, and example inputs of it."""
    function = StepFunction(problems.recipe(make_optimizer), device_type="cpu")
    batch = problems.batch(0)
    function.batch_names = sorted(batch)
    rates = [torch.tensor(0.1)] * function.groups
    inputs = [*function.initial, *rates, *(batch[name] for name in function.batch_names)]
    graph, _ = trace_whole(function, inputs, equal=function.equal_scalars(function.initial))
    return graph, inputs


@pytest.mark.parametrize(
    ("make_optimizer", "kinds"),
    [(problems.sgd, 1), (problems.adamw, 2)],
    ids=["sgd, a group", "adamw, two groups"],
)
def test_an_elementwise_update_is_traced_once_a_group(
    make_optimizer: problems.Optim, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces: list[Any] = []

    def counted(*args: Any, **options: Any) -> torch.fx.GraphModule:
        traces.append(args)
        return trace_unwritten(*args, **options)

    monkeypatch.setattr(updates, "trace_unwritten", counted)
    spliced(make_optimizer)
    assert len(traces) == 1 + kinds, "the gradients, and an update of each group"


class Shapes(torch.fx.Interpreter):
    """Runs a graph and compares what comes out with what its nodes say."""

    def run_node(self, n: torch.fx.Node) -> Any:
        """See `torch.fx.Interpreter.run_node`."""
        result = super().run_node(n)
        if n.op == "call_function" and "val" in n.meta and isinstance(result, Tensor):
            assert n.meta["val"].shape == result.shape, n
        return result


@pytest.mark.parametrize("make_optimizer", [problems.sgd, problems.adamw], ids=["sgd", "adamw"])
def test_nodes_tell_the_shapes_that_they_have_here(make_optimizer: problems.Optim) -> None:
    """A pass that reads a shape must not see that of the parameter which was traced."""
    graph, inputs = spliced(make_optimizer)
    told = [n for n in graph.graph.nodes if n.op == "call_function" and "val" in n.meta]
    assert len(told) > 100
    Shapes(graph).run(*inputs)
