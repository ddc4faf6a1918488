"""Operations under autocast on XLA devices take tensors whose types autocast has mixed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from runner.xla.device import open_device, to_host

SHAPE = (2, 4, 8, 16)
MASKS = {
    "none": None,
    "added": torch.randn(8, 8, generator=torch.Generator().manual_seed(9)),
    "boolean": torch.ones(8, 8, dtype=torch.bool).tril(),
}


def _values() -> list[Tensor]:
    """Queries and keys as rotary positions leave them, and values as a linear layer does."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    return [query, key, value.bfloat16()]


def _attended(device: torch.device, mask: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of all three, on the host."""
    leaves = [value.to(device).requires_grad_() for value in _values()]
    with torch.autocast(device.type, torch.bfloat16):
        output = scaled_dot_product_attention(
            *leaves, attn_mask=None if mask is None else mask.to(device)
        )
    found = [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]
    return found if device.type == "cpu" else to_host(found)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_types_and_values_are_those_of_the_cpu(mask: Tensor | None) -> None:
    found = _attended(open_device(), mask)
    expected = _attended(torch.device("cpu"), mask)
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_float64_is_left_as_it_is() -> None:
    device = open_device()
    query = _values()[0].double().to(device)
    with torch.autocast("xla", torch.bfloat16):
        assert scaled_dot_product_attention(query, query, query).dtype == torch.float64


def test_without_autocast_mixed_types_are_refused_as_ever() -> None:
    query, key, value = (one.to(open_device()) for one in _values())
    with pytest.raises(RuntimeError, match="same dtype"):
        scaled_dot_product_attention(query, key, value)


def _rows(*shape: int, low: bool = False) -> Tensor:
    made = torch.linspace(-2, 2, math.prod(shape)).view(shape)
    return made.bfloat16() if low else made


def _put(x: Tensor, value: Tensor) -> Tensor:
    x = x.clone()
    x[:, torch.tensor([1, 3], device=x.device)] = value
    return x


_PLACES = torch.tensor([[0, 1, 2, 0]])
MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dot": lambda wide, low: torch.dot(wide[0], low[0]),
    "index_add": lambda wide, low: wide.index_add(0, torch.tensor([1]).to(wide.device), low[:1]),
    "lerp": lambda wide, low: torch.lerp(wide, low, 0.3),
    "put": lambda wide, low: _put(wide, low[0, 0]),
    "put_low": lambda wide, low: _put(low, wide[0, 0]),
    "scatter_add": lambda wide, low: wide.scatter_add(0, _PLACES.to(wide.device), low),
    "where": lambda wide, low: torch.where(low > 0, low, wide) @ wide.T.to(torch.float32),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_operands_are_promoted(name: str) -> None:
    device = open_device()
    wide, low = _rows(3, 4), _rows(3, 4, low=True)
    on_device = wide.to(device), low.to(device)
    with torch.autocast("xla", torch.bfloat16):
        got = MIXED[name](*on_device)
    expected = MIXED[name](wide, low.float() if name != "put_low" else wide)
    assert got.dtype == (torch.bfloat16 if name in ("put_low", "where") else torch.float32)
    torch.testing.assert_close(to_host([got])[0].float(), expected, rtol=2e-2, atol=2e-2)


def test_losses_are_float32() -> None:
    low = _rows(3, 4, low=True).to(open_device())
    with torch.autocast("xla", torch.bfloat16):
        for loss in (F.poisson_nll_loss, F.huber_loss, F.cosine_similarity):
            assert loss(low, low).dtype == torch.float32
