"""Passes over the functional graph, on graphs small enough to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from runner.backends.passes.casts import shorten_casts
from runner.backends.passes.operands import keep_operands
from runner.backends.passes.parts import stack_parts
from runner.backends.passes.roundings import round_once
from runner.backends.passes.sums import widen_sums
from runner.backends.step.trace import trace_step
from runner.xla.barrier import BARRIER
from runner.xla.device import open_device, to_host

BF16, F32 = torch.bfloat16, torch.float32


def _graph(function: Callable[[Tensor], Sequence[Tensor]], dtype: torch.dtype) -> fx.GraphModule:
    return trace_step(function, [torch.empty(4, 6, dtype=dtype)])


def _targets(graph: fx.GraphModule) -> list[str]:
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in called if target != "aten.detach.default"]


def _all(graph: fx.GraphModule, value: Tensor) -> list[Tensor]:
    graph.recompile()
    results: list[Tensor] = graph(value)
    return results


def _run(graph: fx.GraphModule, value: Tensor) -> Tensor:
    return _all(graph, value)[0]


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


@pytest.mark.parametrize(
    "take",
    [lambda x: x.sum(1), lambda x: x.sum(), lambda x: x.mean((0, 1), keepdim=True), torch.mean],
)
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
    graph = _graph(lambda x: [add(x, BF16)], BF16)
    value = torch.linspace(-3, 3, 24).view(4, 6).to(BF16)
    twice = _run(graph, value)
    assert round_once(graph.graph) > 0
    once = _run(graph, value)
    expected = add(value.float(), F32)
    assert once.dtype == BF16
    assert (once - expected).norm() < (twice - expected).norm()


@pytest.mark.parametrize("activation", [F.elu, F.mish, F.silu])
def test_an_activation_is_computed_in_float32(activation: Callable[[Tensor], Tensor]) -> None:
    graph = _graph(lambda x: [activation(x)], BF16)
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

    graph = _graph(step, BF16)
    assert round_once(graph.graph) == 2
    named = activation.__name__
    for node in graph.graph.nodes:
        if named in str(node.target):
            assert {one.meta["val"].dtype for one in [node, *node.all_input_nodes]} == {F32}
    value = torch.randn(4, 6).to(BF16)
    share = torch.tensor(0.7).to(BF16).float()
    wide = value.float().requires_grad_()
    (gradient,) = torch.autograd.grad(activation(wide), wide, share.expand(4, 6))
    for got, expected in zip(_all(graph, value), (activation(wide), gradient), strict=True):
        torch.testing.assert_close(got, expected.to(BF16), rtol=0, atol=0)


@pytest.mark.parametrize("readers", [1, 2])
def test_float32_is_read_by_one_operation_alone(readers: int) -> None:
    """Read by several it would lie in memory, twice as large as without the pass."""

    def step(x: Tensor) -> list[Tensor]:
        y = F.gelu(x)
        return [y.float() * (1 + place) for place in range(readers)]

    graph = _graph(step, BF16)
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
    assert round_once(_graph(function, BF16).graph) == 0


def test_a_mask_reads_no_numbers() -> None:
    """ReLU's gradient, which asks what was positive, keeps no sum from reading it unrounded."""

    def step(x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = torch.relu((leaf.float() * 1.1).to(BF16)) + x
        return [y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))]

    graph = _graph(step, BF16)
    assert round_once(graph.graph) == 2
    value = torch.randn(4, 6).to(BF16)
    for got, expected in zip(_all(graph, value), step(value), strict=True):
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
    graph = _graph(step, F32)
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
    graph = _graph(step, F32)
    stack_parts(graph.graph)
    torch.testing.assert_close(_run(graph, value), step(value)[0], rtol=1e-6, atol=1e-6)


def _products(x: Tensor, low: Tensor) -> list[Tensor]:
    """Two products of the same bf16 numbers, and what else reads the float32 ones."""
    wide = x.sin()
    other = wide.to(BF16)
    return [low @ other.t(), low.view(2, 12).view(4, 6).t() @ other, wide]


def _stream(x: Tensor) -> list[Tensor]:
    total = x + x.cos()
    return _products(total, total.to(BF16))


def _scaled(x: Tensor) -> list[Tensor]:
    """The gradient of a layer that is scaled before it is added to a stream, and its bias'."""
    scaled = (x.sin() * x[:1].cos()).to(BF16)
    return [*_products(scaled, scaled)[:2], scaled.view(2, 12).view(4, 6).sum(0)]


@pytest.mark.parametrize("function", [_stream, _scaled])
def test_what_products_read_in_bf16_is_rounded_before_them(
    function: Callable[[Tensor], Sequence[Tensor]],
) -> None:
    graph = _graph(function, F32)
    value = torch.randn(4, 6).to(open_device())
    expected = to_host(_all(graph, value))
    assert keep_operands(graph.graph) == 1
    for found, one in zip(to_host(_all(graph, value)), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=0)
    (barrier,) = (node for node in graph.graph.nodes if node.target is BARRIER)
    (cast,) = barrier.all_input_nodes
    assert list(cast.users) == [barrier]


def _gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return ((x @ gate).sin() * (x @ up)) @ down


def _plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """No two gradients are made of one."""
    return ((x @ gate).sin() @ up).exp() @ down


def _layer(
    layer: Callable[..., Tensor], sizes: Sequence[tuple[int, int]], *, of: int
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A layer's loss and its gradients by the last of the inputs, and such inputs."""

    def step(*flat: Tensor) -> list[Tensor]:
        inputs = [one.detach().requires_grad_() for one in flat]
        loss = layer(*inputs).square().sum()
        return [loss, *torch.autograd.grad(loss, inputs[-of:])]

    values = [torch.randn(size, dtype=BF16) for size in sizes]
    return trace_step(step, [torch.empty_like(value) for value in values]), values


def test_gradients_of_two_factors_are_made_before_the_products_that_read_them() -> None:
    graph, values = _layer(_gated, [(4, 6), (6, 8), (6, 8), (8, 6)], of=4)
    placed = [value.to(open_device()) for value in values]
    expected = to_host(graph(*placed))
    assert keep_operands(graph.graph) == 2
    graph.recompile()
    for found, one in zip(to_host(graph(*placed)), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=0)
    held = [node.all_input_nodes[0] for node in graph.graph.nodes if node.target is BARRIER]
    assert [node.meta["val"].shape for node in held] == [(4, 8), (4, 8)]
    output = graph.graph.output_node()
    output.args = (output.all_input_nodes[:1],)
    graph.graph.eliminate_dead_code()
    assert BARRIER not in [node.target for node in graph.graph.nodes], "the loss needs none"


def _fan(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """So many ways lead through it that nobody can go them all."""
    hidden = x @ gate @ up
    for _ in range(40):
        hidden = hidden + 0.1 * hidden.sin()
    return hidden @ down


@pytest.mark.parametrize(
    ("layer", "up", "of"),
    [(_gated, (6, 8), 3), (_plain, (8, 8), 4), (_fan, (8, 8), 4)],
    ids=["one reader", "plain", "many ways"],
)
def test_gradients_that_xla_computes_once_are_left_to_it(
    layer: Callable[..., Tensor], up: tuple[int, int], of: int
) -> None:
    graph, _ = _layer(layer, [(4, 6), (6, 8), up, (8, 6)], of=of)
    assert keep_operands(graph.graph) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: _products(x, x.to(BF16)),
        lambda x: _products(x.cos(), x.cos().to(BF16)),
        lambda x: _products(x, (x + x.cos()).to(BF16)),
        lambda x: _products(x + x.cos(), (x + x.cos()).to(BF16))[::2],
        lambda x: _products(x, x.bfloat16() + x.bfloat16()),
        lambda x: _scaled(x)[:2],
        lambda x: _scaled(x)[1:],
        lambda x: [*_products(y := (x.sin() * x.cos()).to(BF16), y)[:2], y.sum(0)],
    ],
    ids=[
        "an input",
        "no sum",
        "read in bf16 alone",
        "one product",
        "in bf16",
        "scaled, no bias",
        "scaled, one product",
        "no scale",
    ],
)
def test_other_operands_are_left_to_the_compiler(
    function: Callable[[Tensor], Sequence[Tensor]],
) -> None:
    assert keep_operands(_graph(function, F32).graph) == 0


def test_a_pass_that_is_computed_again_is_no_backward_pass() -> None:
    graph, _ = _layer(_gated, [(4, 6), (6, 8), (6, 8), (8, 6)], of=4)
    with graph.graph.inserting_before(graph.graph.output_node()):
        held = list(graph.graph.find_nodes(op="placeholder"))[:2]
        graph.graph.call_function(BARRIER, (held,))
    assert keep_operands(graph.graph) == 0


def test_an_input_that_tells_no_size_may_be_a_scale() -> None:
    def step(x: Tensor) -> list[Tensor]:
        scaled = (x.sin() * x).to(BF16)
        return [*_products(scaled, scaled)[:2], scaled.sum(0)]

    graph = _graph(step, F32)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.pop("val", None)
    assert keep_operands(graph.graph) == 1
