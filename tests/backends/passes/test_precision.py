"""What is bf16 and what float32 under autocast, by way of the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.backends.passes.pipeline import Passes
from runner.config.schema import PassesConfig

BF16, F32 = torch.bfloat16, torch.float32
#: All that rounds.
EVERYTHING = PassesConfig(embeddings=True, parameters=True)


def _result(
    function: Callable[[], Tensor], *parameters: Tensor, batch: tuple[Tensor, ...] = ()
) -> Tensor:
    passes = Passes(EVERYTHING)
    passes.parameters.hold(parameters)
    passes.batch.hold(batch)
    with passes.rewriting(), torch.autocast("cpu", BF16):
        return function()


NORMS = {
    "batch": (nn.BatchNorm2d(8), (4, 8, 3, 3)),
    "layer": (nn.LayerNorm(8), (4, 8)),
    "group": (nn.GroupNorm(2, 8), (4, 8, 3, 3)),
    "instance": (nn.InstanceNorm2d(8, affine=True), (4, 8, 3, 3)),
    "rms": (nn.RMSNorm(8), (4, 8)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_keep_the_type_and_compute_in_float32(name: str) -> None:
    torch.manual_seed(0)
    norm, shape = NORMS[name]
    x = 100 + torch.randn(shape).to(BF16)
    got = _result(lambda: norm(x))
    assert got.dtype == BF16
    # Batch norm takes one pass over x, as XLA's own does, and is as far off as 1e-7 * 100**2.
    rtol, atol = {"batch": (2**-7, 1e-3), "layer": (2**-7, 1e-4)}.get(name, (0, 0))
    torch.testing.assert_close(got, norm(x.float()).to(BF16), rtol=rtol, atol=atol)
    assert _result(lambda: norm(x.float())).dtype == F32


def test_running_statistics_stay_float32() -> None:
    norm = nn.BatchNorm1d(8)
    x = torch.randn(16, 8).to(BF16)
    _result(lambda: norm(x))
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.float().var(0))


def test_rows_of_embeddings_are_bf16_and_their_gradients_are_summed_in_float32() -> None:
    table = nn.Embedding(3, 2)
    numbers = torch.zeros(1000, dtype=torch.int64)
    rows = _result(lambda: table(numbers))
    assert rows.dtype == BF16
    rows.backward(torch.full_like(rows, 0.1))
    assert table.weight.grad is not None
    # In bf16 the sum would stop at 32.
    torch.testing.assert_close(table.weight.grad[0], 1000 * torch.full((2,), 0.1).to(BF16).float())


@pytest.mark.parametrize(
    "meet",
    [
        lambda x, p: x + p,
        lambda x, p: p + x,
        lambda x, p: x - p[:1],
        lambda x, p: p * x,
        lambda x, p: torch.cat((p.expand(2, -1), x)),
        lambda x, p: torch.concatenate((p.expand(2, -1), x)),
        lambda x, p: torch.multiply(x, p),
        lambda x, p: x.subtract(p),
        lambda x, p: torch.add(x, p, alpha=2),
    ],
)
def test_parameters_meet_activations_in_bf16(meet: Callable[[Tensor, Tensor], Tensor]) -> None:
    parameter = torch.randn(1, 6, requires_grad=True)
    x = torch.randn(1000, 6).to(BF16)
    got = _result(lambda: meet(x, parameter), parameter)
    assert got.dtype == BF16
    expected = meet(x, parameter.to(BF16))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    weights = torch.ones_like(got)
    (gradient,) = torch.autograd.grad(got, parameter, weights)
    (wide,) = torch.autograd.grad(meet(x.float(), parameter), parameter, weights.float())
    torch.testing.assert_close(gradient, wide, rtol=2e-3, atol=1e-3 * wide.abs().max().item())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_batch_is_convolved_without_a_copy_in_bf16(dims: int) -> None:
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer, x = make(3, 4, 3, padding="same"), torch.randn(2, 3, *[5] * dims)
    got = _result(lambda: layer(x), batch=(x,))
    torch.testing.assert_close(got, layer(x).to(BF16), rtol=0, atol=0)
    weights = torch.randn(got.shape).to(BF16)
    found = torch.autograd.grad(got, layer.parameters(), weights)
    expected = torch.autograd.grad(layer(x), layer.parameters(), weights.float())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stride", "given"), [(1, False), (3, True), ((3, 4), True)])
def test_activations_and_patches_are_convolved_in_bf16(stride: Any, given: bool) -> None:
    layer, x = nn.Conv2d(3, 4, 3, stride), torch.randn(2, 3, 6, 7)
    with torch.autocast("cpu", BF16):
        expected = layer(x)
    got = _result(lambda: layer(x), batch=(x,) if given else ())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_convolution_whose_weights_are_bf16_reads_bf16() -> None:
    layer, x = nn.Conv1d(3, 4, 3).to(BF16), torch.randn(2, 3, 8)
    got = _result(lambda: layer(x), batch=(x,))
    torch.testing.assert_close(got, layer(x.to(BF16)), rtol=0, atol=0)


def test_what_is_no_parameter_keeps_its_precision() -> None:
    buffer, x = torch.randn(6), torch.randn(4, 6).to(BF16)
    assert _result(lambda: x + buffer).dtype == F32


def test_without_autocast_nothing_is_rounded() -> None:
    passes = Passes(EVERYTHING)
    x, parameter = torch.randn(4, 6), torch.randn(6, requires_grad=True)
    passes.parameters.hold([parameter])
    with passes.rewriting():
        got = F.layer_norm(x + parameter, (6,))
    torch.testing.assert_close(got, F.layer_norm(x + parameter, (6,)), rtol=0, atol=0)
    assert passes.made == {}
