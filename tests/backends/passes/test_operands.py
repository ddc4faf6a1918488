"""What several matrix products read, on graphs small enough to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx

from runner.backends.passes.operands import keep_operands
from runner.backends.step.trace import trace_step
from runner.xla.barrier import BARRIER
from runner.xla.device import open_device, to_host
from tests.backends.passes.graphs import graph_of, run_all

BF16, F32 = torch.bfloat16, torch.float32


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
    graph = graph_of(function, F32)
    value = torch.randn(4, 6).to(open_device())
    expected = to_host(run_all(graph, value))
    assert keep_operands(graph.graph) == 1
    for found, one in zip(to_host(run_all(graph, value)), expected, strict=True):
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
    assert keep_operands(graph_of(function, F32).graph) == 0


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

    graph = graph_of(step, F32)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.pop("val", None)
    assert keep_operands(graph.graph) == 1
