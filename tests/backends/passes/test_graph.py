"""Passes over the functional graph, on graphs small enough to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from runner.backends.passes.casts import shorten_casts
from runner.backends.passes.parts import stack_parts
from runner.backends.passes.roundings import round_once
from runner.backends.passes.sums import widen_sums
from runner.backends.step.trace import trace_step
from runner.xla.barrier import BARRIER
from runner.xla.device import open_device, to_host
from tests.backends.passes.graphs import graph_of, run_all

BF16, F32 = torch.bfloat16, torch.float32


def _targets(graph: fx.GraphModule) -> list[str]:
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in called if target != "aten.detach.default"]


def _run(graph: fx.GraphModule, value: Tensor) -> Tensor:
    return run_all(graph, value)[0]


def test_there_and_back_by_a_wider_type_is_nothing() -> None:
    graph = graph_of(lambda x: [x.float().to(BF16) + 1], BF16)
    assert shorten_casts(graph.graph) == 1
    assert _targets(graph) == ["aten.add.Tensor"]


def test_a_cast_by_way_of_a_wider_type_is_one() -> None:
    graph = graph_of(lambda x: [x.float().double().sin()], BF16)
    value = torch.randn(4, 6).to(BF16)
    expected = value.double().sin()
    assert shorten_casts(graph.graph) == 1
    assert _targets(graph) == ["aten._to_copy.default", "aten.sin.default"]
    torch.testing.assert_close(_run(graph, value), expected, rtol=0, atol=0)


@pytest.mark.parametrize("between", [BF16, torch.float16, torch.int32])
def test_a_cast_that_rounds_stays(between: torch.dtype) -> None:
    graph = graph_of(lambda x: [x.to(between).float() + 1], F32)
    assert shorten_casts(graph.graph) == 0
    assert _targets(graph).count("aten._to_copy.default") == 2


@pytest.mark.parametrize(
    "take",
    [lambda x: x.sum(1), lambda x: x.sum(), lambda x: x.mean((0, 1), keepdim=True), torch.mean],
)
def test_sums_of_bf16_are_rounded_once(take: Callable[[Tensor], Tensor]) -> None:
    graph = graph_of(lambda x: [take(x) * 2], BF16)
    assert widen_sums(graph.graph) == 1
    value = torch.randn(4, 6).to(BF16)
    expected = take(value.float()).to(BF16) * 2
    torch.testing.assert_close(_run(graph, value), expected, rtol=0, atol=0)


def test_a_sum_that_is_cast_to_float32_is_not_rounded() -> None:
    graph = graph_of(lambda x: [x.sum(0).float()], BF16)
    assert widen_sums(graph.graph) == 1
    assert shorten_casts(graph.graph) == 1
    assert _targets(graph) == ["aten.sum.dim_IntList"]
    value = torch.randn(4, 6).to(BF16)
    torch.testing.assert_close(_run(graph, value), value.float().sum(0), rtol=0, atol=0)


def test_sums_of_float32_stay() -> None:
    assert widen_sums(graph_of(lambda x: [x.sum(0)], F32).graph) == 0


@pytest.mark.parametrize(
    "add",
    [
        lambda x, low: (x.float() * 1.1).to(low) + x,
        lambda x, low: x - (x.float() * 1.1).to(low),
        lambda x, low: torch.relu((x.float() * 1.1).to(low)) + x,
    ],
)
def test_what_was_computed_in_float32_is_added_before_it_is_rounded(
    add: Callable[[Tensor, torch.dtype], Tensor],
) -> None:
    graph = graph_of(lambda x: [add(x, BF16)], BF16)
    value = torch.linspace(-3, 3, 24).view(4, 6).to(BF16)
    twice = _run(graph, value)
    assert round_once(graph.graph) > 0
    once = _run(graph, value)
    expected = add(value.float(), F32)
    assert once.dtype == BF16
    assert (once - expected).norm() < (twice - expected).norm()


@pytest.mark.parametrize("activation", [F.elu, F.mish, F.silu])
def test_an_activation_is_computed_in_float32(activation: Callable[[Tensor], Tensor]) -> None:
    graph = graph_of(lambda x: [activation(x)], BF16)
    assert round_once(graph.graph) == 1
    cast = "aten._to_copy.default"
    assert _targets(graph) == [cast, f"aten.{activation.__name__}.default", cast]
    value = torch.randn(4, 6).to(BF16)
    expected = activation(value.float()).to(BF16)
    torch.testing.assert_close(_run(graph, value), expected, rtol=0, atol=0)


@pytest.mark.parametrize("activation", [F.gelu, F.hardswish])
def test_an_activation_and_its_gradient_are_computed_in_float32(
    activation: Callable[[Tensor], Tensor],
) -> None:
    def step(x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = activation(x)
        return [y.detach(), torch.autograd.grad(y, x, torch.full_like(y, 0.7))[0]]

    graph = graph_of(step, BF16)
    assert round_once(graph.graph) == 2
    named = activation.__name__
    for node in graph.graph.nodes:
        if named in str(node.target):
            assert {one.meta["val"].dtype for one in [node, *node.all_input_nodes]} == {F32}
    value = torch.randn(4, 6).to(BF16)
    share = torch.tensor(0.7).to(BF16).float()
    wide = value.float().requires_grad_()
    (gradient,) = torch.autograd.grad(activation(wide), wide, share.expand(4, 6))
    for got, expected in zip(run_all(graph, value), (activation(wide), gradient), strict=True):
        torch.testing.assert_close(got, expected.to(BF16), rtol=0, atol=0)


@pytest.mark.parametrize("readers", [1, 2])
def test_float32_is_read_by_one_operation_alone(readers: int) -> None:
    """Read by several it would lie in memory, twice as large as without the pass."""

    def step(x: Tensor) -> list[Tensor]:
        y = F.gelu(x)
        return [y.float() * (1 + place) for place in range(readers)]

    graph = graph_of(step, BF16)
    assert round_once(graph.graph) == 1
    shorten_casts(graph.graph)
    (gelu,) = (node for node in graph.graph.nodes if "gelu" in str(node.target))
    (reader,) = gelu.users
    assert reader.meta["val"].dtype == (F32 if readers == 1 else BF16)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x * 1.1 + x],
        lambda x: [(half := (x.float() * 1.1).to(BF16)) + x, half],
        lambda x: [x.float().mean(0).to(BF16) + x],
        lambda x: [torch.relu((x.float() * 1.1).to(BF16)) @ x.T],
    ],
    ids=["bf16 before", "read twice", "broadcast", "no sum"],
)
def test_other_roundings_stay(function: Callable[[Tensor], Sequence[Tensor]]) -> None:
    assert round_once(graph_of(function, BF16).graph) == 0


def test_a_mask_reads_no_numbers() -> None:
    """ReLU's gradient, which asks what was positive, keeps no sum from reading it unrounded."""

    def step(x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = torch.relu((leaf.float() * 1.1).to(BF16)) + x
        return [y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))]

    graph = graph_of(step, BF16)
    assert round_once(graph.graph) == 2
    value = torch.randn(4, 6).to(BF16)
    for got, expected in zip(run_all(graph, value), step(value), strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)


def _whole(take: Callable[[Tensor], Sequence[Tensor]]) -> Callable[[Tensor], list[Tensor]]:
    """The gradient by x of something computed from parts of it."""

    def step(x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        parts = take(x)
        total = sum((place + 1) * part.sin().sum() for place, part in enumerate(parts))
        assert isinstance(total, Tensor)
        return [torch.autograd.grad(total, x)[0]]

    return step


@pytest.mark.parametrize(
    "take",
    [
        lambda x: [x[2], x[0], x[3], x[1]],
        lambda x: [x[:, place] for place in range(6)],
        lambda x: list(map(x.view(2, 2, 6).select, [1, 1], [1, 0])),
    ],
)
def test_gradients_of_all_parts_are_stacked(take: Callable[[Tensor], Sequence[Tensor]]) -> None:
    step, value = _whole(take), torch.randn(4, 6)
    graph = graph_of(step, F32)
    assert stack_parts(graph.graph) == 1
    targets = _targets(graph)
    assert "aten.stack.default" in targets
    assert "aten.select_backward.default" not in targets
    torch.testing.assert_close(_run(graph, value), step(value)[0], rtol=0, atol=0)


def _cut(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of a linear layer whose output is cut into queries, keys and values."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    parts = (x @ weight.t()).view(2, 2, 3, 2).permute(2, 0, 3, 1)
    q, k, v = parts[0], parts[1], parts[2]
    return list(torch.autograd.grad(((q * k).sin() * v).sum(), [x, weight]))


def test_two_products_read_one_tensor_of_stacked_parts() -> None:
    graph = trace_step(_cut, [torch.empty(4, 6), torch.empty(6, 6)])
    values = [torch.randn(size, 6).to(open_device()) for size in (4, 6)]
    expected = to_host(graph(*values))
    assert stack_parts(graph.graph) == 1
    graph.recompile()
    for found, one in zip(to_host(graph(*values)), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=0)
    (barrier,) = (node for node in graph.graph.nodes if node.target is BARRIER)
    (rearranged,) = barrier.all_input_nodes
    assert rearranged.meta["val"].shape[-1] == 6
    assert list(rearranged.users) == [barrier]


def test_one_product_may_have_stacked_parts_rearranged_as_it_likes() -> None:
    graph = trace_step(lambda x, w: _cut(x, w)[:1], [torch.empty(4, 6), torch.empty(6, 6)])
    assert stack_parts(graph.graph) == 1
    assert BARRIER not in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize(
    "take",
    [
        lambda x: [x[0], x[1], x[2]],
        lambda x: [x[0], x[1], x[2], x[3], x[3]],
        lambda x: [x[0], x[1], x[2], x[3], x],
        lambda x: [x[0], x[1], x[:, 0], x[:, 1]],
    ],
)
def test_other_sums_of_parts_keep_their_values(take: Callable[[Tensor], Sequence[Tensor]]) -> None:
    step, value = _whole(take), torch.randn(4, 6)
    graph = graph_of(step, F32)
    stack_parts(graph.graph)
    torch.testing.assert_close(_run(graph, value), step(value)[0], rtol=1e-6, atol=1e-6)
