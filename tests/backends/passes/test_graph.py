"""Passes over the functional graph, on graphs small enough to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx

from runner.backends.passes.casts import shorten_casts
from runner.backends.passes.sums import widen_sums
from runner.backends.step.trace import trace_step

BF16, F32 = torch.bfloat16, torch.float32


def _graph(function: Callable[[Tensor], Sequence[Tensor]], dtype: torch.dtype) -> fx.GraphModule:
    return trace_step(function, [torch.empty(4, 6, dtype=dtype)])


def _targets(graph: fx.GraphModule) -> list[str]:
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in called if target != "aten.detach.default"]


def _run(graph: fx.GraphModule, value: Tensor) -> Tensor:
    graph.recompile()
    result: Tensor = graph(value)[0]
    return result


def test_there_and_back_by_a_wider_type_is_nothing() -> None:
    graph = _graph(lambda x: [x.float().to(BF16) + 1], BF16)
    assert shorten_casts(graph.graph) == 1
    assert _targets(graph) == ["aten.add.Tensor"]


def test_a_cast_by_way_of_a_wider_type_is_one() -> None:
    graph = _graph(lambda x: [x.float().double().sin()], BF16)
    value = torch.randn(4, 6).to(BF16)
    expected = value.double().sin()
    assert shorten_casts(graph.graph) == 1
    assert _targets(graph) == ["aten._to_copy.default", "aten.sin.default"]
    torch.testing.assert_close(_run(graph, value), expected, rtol=0, atol=0)


@pytest.mark.parametrize("between", [BF16, torch.float16, torch.int32])
def test_a_cast_that_rounds_stays(between: torch.dtype) -> None:
    graph = _graph(lambda x: [x.to(between).float() + 1], F32)
    assert shorten_casts(graph.graph) == 0
    assert _targets(graph).count("aten._to_copy.default") == 2


@pytest.mark.parametrize("take", [lambda x: x.sum(1), lambda x: x.mean((0, 1), keepdim=True)])
def test_sums_of_bf16_are_rounded_once(take: Callable[[Tensor], Tensor]) -> None:
    graph = _graph(lambda x: [take(x) * 2], BF16)
    assert widen_sums(graph.graph) == 1
    value = torch.randn(4, 6).to(BF16)
    expected = take(value.float()).to(BF16) * 2
    torch.testing.assert_close(_run(graph, value), expected, rtol=0, atol=0)


def test_a_sum_that_is_cast_to_float32_is_not_rounded() -> None:
    graph = _graph(lambda x: [x.sum(0).float()], BF16)
    assert widen_sums(graph.graph) == 1
    assert shorten_casts(graph.graph) == 1
    assert _targets(graph) == ["aten.sum.dim_IntList"]
    value = torch.randn(4, 6).to(BF16)
    torch.testing.assert_close(_run(graph, value), value.float().sum(0), rtol=0, atol=0)


def test_sums_of_float32_stay() -> None:
    assert widen_sums(_graph(lambda x: [x.sum(0)], F32).graph) == 0
