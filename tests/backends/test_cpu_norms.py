"""Norms that XLA's CPU compiler computes badly are written out; the numbers are torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from runner.backends.sharding import ONE_DEVICE
from runner.backends.step.cpu_norms import QUICK_NORMS, norms_for, spread_norms
from runner.backends.step.trace import trace_step

NORMS: dict[str, nn.Module] = {
    "batch": nn.BatchNorm2d(8),
    "group": nn.GroupNorm(2, 8),
    "layer": nn.LayerNorm([4, 4]),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_written_out_forward_and_backward(kind: str) -> None:
    norm = NORMS[kind]
    named = {name: t.detach() for name, t in [*norm.named_parameters(), *norm.named_buffers()]}
    x = torch.randn(6, 8, 4, 4, generator=torch.Generator().manual_seed(0))

    def step(x: Tensor, *values: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        lent = dict(zip(named, values, strict=True))
        output = functional_call(norm, lent, (leaf,))
        (gradient,) = torch.autograd.grad(output.square().sum() + output[0].sum(), [leaf])
        return [output, gradient, *(t for name, t in lent.items() if name.startswith("running"))]

    inputs = [x, *named.values()]
    whole, apart = trace_step(step, inputs), trace_step(step, inputs, decomposed=spread_norms())
    norms = {overload for overload in spread_norms()}
    assert norms & {node.target for node in whole.graph.nodes}
    assert not norms & {node.target for node in apart.graph.nodes}
    copies = [tensor.clone() for tensor in inputs]
    torch.testing.assert_close(apart(*inputs), step(*copies), rtol=1e-5, atol=1e-5)


BACKWARD = torch.ops.aten.native_batch_norm_backward.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_a_trained_batch_norm_are_products_on_one_device(dtype: torch.dtype) -> None:
    """Only in float32, where the order of the sums is all that changes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, 4, 5, generator=generator) * 3 + 1
    weight, bias = torch.randn(8, generator=generator), torch.randn(8, generator=generator)

    def step(x: Tensor, *values: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *values)]
        inner = leaves[0].to(dtype) if dtype is torch.bfloat16 else leaves[0]
        output = nn.functional.batch_norm(inner, None, None, leaves[1], leaves[2], training=True)
        return list(torch.autograd.grad((output - 1).pow(3).sum(), leaves))

    inputs = [x, weight, bias]
    held = [tensor.to("xla") for tensor in inputs]
    graph = trace_step(step, held, decomposed=QUICK_NORMS)
    left = sum(node.target is BACKWARD for node in graph.graph.nodes)
    assert left == (dtype is torch.bfloat16)
    if not left:
        found = [tensor.cpu().double() for tensor in graph(*held)]
        exact = step(*(tensor.double() for tensor in inputs))
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)


def test_what_is_not_trained_stays_whole() -> None:
    """Without a weight, or with the running statistics."""
    x = torch.randn(6, 8, 4, 4, generator=torch.Generator().manual_seed(0))

    def frozen(x: Tensor, mean: Tensor, variance: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        still = nn.functional.batch_norm(leaf, mean, variance)
        bare = nn.functional.batch_norm(leaf, None, None, training=True)
        return list(torch.autograd.grad((still * bare).square().sum(), [leaf]))

    inputs = [x, torch.zeros(8), torch.ones(8)]
    graph = trace_step(frozen, inputs, decomposed=QUICK_NORMS)
    assert sum(node.target is BACKWARD for node in graph.graph.nodes) == 2
    torch.testing.assert_close(graph(*inputs), frozen(*inputs), rtol=1e-4, atol=1e-4)


def test_one_device_and_several_want_different_norms() -> None:
    assert norms_for(ONE_DEVICE) is QUICK_NORMS
