"""Attention under autocast on XLA devices takes what it takes under autocast on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
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
