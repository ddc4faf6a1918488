"""A step that is traced for a mesh holds no norm that XLA cannot cut; the numbers are torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from runner.backends.step.spread import spread_norms
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
    whole, apart = trace_step(step, inputs), trace_step(step, inputs, plain_norms=True)
    norms = {overload for overload in spread_norms()}
    assert norms & {node.target for node in whole.graph.nodes}
    assert not norms & {node.target for node in apart.graph.nodes}
    copies = [tensor.clone() for tensor in inputs]
    torch.testing.assert_close(apart(*inputs), step(*copies), rtol=1e-5, atol=1e-5)
