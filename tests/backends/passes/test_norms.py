"""Batch and layer norm as the passes write them out, beside torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.backends.passes.pipeline import Passes
from runner.config.schema import PassesConfig

BF16 = torch.bfloat16
Norm = Callable[[Tensor], Tensor]

LAYERS = {
    "batch": (lambda: nn.BatchNorm2d(6), (5, 6, 4, 3)),
    "batch of rows": (lambda: nn.BatchNorm1d(6), (9, 6)),
    "batch, nothing learned": (lambda: nn.BatchNorm3d(6, affine=False), (4, 6, 2, 2, 3)),
    "batch, nothing kept": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (5, 6, 4, 3)),
    "layer": (lambda: nn.LayerNorm(6), (5, 4, 6)),
    "layer over two": (lambda: nn.LayerNorm((4, 6)), (5, 4, 6)),
    "layer without bias": (lambda: nn.LayerNorm(6, bias=False), (5, 6)),
    "layer, nothing learned": (lambda: nn.LayerNorm(6, elementwise_affine=False), (5, 6)),
}


def _layer(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0)
    return layer, (0.5 + 2 * torch.randn(shape)).to(BF16)


def _passed(function: Norm, x: Tensor) -> Tensor:
    passes = Passes(PassesConfig())
    with passes.rewriting(), torch.autocast("cpu", BF16):
        result = function(x)
    assert passes.made == {"norms": 1}
    return result


def _gradients(y: Tensor, layer: nn.Module, x: Tensor, *, deep: bool) -> list[Tensor]:
    """Of a sum with given weights; `deep`: of the sum of the squares of those gradients."""
    inputs = [x, *layer.parameters()]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    first = torch.autograd.grad(y, inputs, weights.to(y.dtype), create_graph=deep)
    if not deep:
        return list(first)
    total = torch.stack([one.double().square().sum() for one in first]).sum()
    return list(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("deep", [False, True], ids=["gradients", "gradients of gradients"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_float64_rounded(name: str, deep: bool) -> None:
    layer, x = _layer(name)
    x.requires_grad_()
    y = _passed(layer, x)
    found = _gradients(y, layer, x, deep=deep)
    exact, wide = _layer(name)[0].double(), x.detach().double().requires_grad_()
    expected = exact(wide)
    assert y.dtype == found[0].dtype == BF16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)
    for one, other in zip(found, _gradients(expected, exact, wide, deep=deep), strict=True):
        assert (one.double() - other).norm() <= 2**-7 * other.norm()
    for (kind, kept), other in zip(layer.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(kept.double(), other.double(), rtol=1e-6, atol=1e-6, msg=kind)


def test_running_statistics_are_used_as_they_are_in_an_evaluation() -> None:
    layer, x = _layer("batch")
    layer.eval()
    expected = layer(x.float()).to(BF16)
    torch.testing.assert_close(_passed(layer, x), expected, rtol=0, atol=0)


def test_running_statistics_keep_their_type() -> None:
    layer, x = nn.BatchNorm1d(6).to(BF16), torch.randn(8, 6).to(BF16)
    passes = Passes(PassesConfig())
    with passes.rewriting(), torch.autocast("cpu", BF16):
        layer(x)
    assert layer.running_mean is not None
    assert layer.running_mean.dtype == BF16
    expected = 0.1 * x.float().mean(0)
    torch.testing.assert_close(layer.running_mean.float(), expected, rtol=2**-7, atol=1e-3)


def test_gradients_of_single_samples() -> None:
    """What `torch.func` makes of a layer norm: a vmap over its gradient."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 6).to(BF16), torch.randn(6)

    def total(weight: Tensor, x: Tensor) -> Tensor:
        return F.layer_norm(x, (6,), weight).float().square().sum()

    passes = Passes(PassesConfig())
    with passes.rewriting(), torch.autocast("cpu", BF16):
        found = torch.func.vmap(torch.func.grad(total), (None, 0))(weight, x)
    expected = torch.func.vmap(torch.func.grad(total), (None, 0))(weight.double(), x.double())
    assert passes.made == {"norms": 1}
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
