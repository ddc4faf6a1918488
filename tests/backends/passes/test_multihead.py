"""`nn.MultiheadAttention` by way of its pass has the values and gradients of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from runner.backends.passes.pipeline import Passes
from runner.config.schema import PassesConfig
from tests.backends.passes.compare import rewritten

BATCH, LENGTH, WIDTH, HEADS = 2, 5, 8, 2
BOTH = {"attention": 1, "multihead": 1}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _layer(**options: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for bias in (layer.in_proj_bias, layer.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return layer


def _attends(layer: nn.Module, **given: Any) -> Callable[..., Tensor]:
    """A scalar of self-attention by its input and all its parameters."""
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        options = {"need_weights": False, **given}
        held = dict(zip(names, parameters, strict=True))
        mixed: Tensor = torch.func.functional_call(layer, held, (x, x, x), options)[0]
        weights = torch.linspace(-1, 2, mixed.numel(), dtype=mixed.dtype).view(mixed.shape)
        return (mixed * weights).sum()

    return function


def _made(layer: nn.Module, **given: Any) -> dict[str, int]:
    x = torch.randn(BATCH, LENGTH, WIDTH)
    return rewritten(_attends(layer, **given), x, *layer.parameters())


@pytest.mark.parametrize(
    "options", [{"batch_first": True}, {"batch_first": False}, {"batch_first": True, "bias": False}]
)
def test_plain(options: dict[str, Any]) -> None:
    assert _made(_layer(**options)) == BOTH


def test_masks_of_what_is_hidden() -> None:
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    layer = _layer(batch_first=True)
    assert _made(layer, attn_mask=hidden) == BOTH
    assert _made(layer, attn_mask=hidden, is_causal=True) == BOTH


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_of_numbers(causal: bool) -> None:
    later = torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)
    layer = _layer(batch_first=True)
    got, expected = (
        _outcome(layer, passes, attn_mask=later, is_causal=causal) for passes in (True, False)
    )
    torch.testing.assert_close(got, expected)


def _outcome(layer: nn.Module, passes: bool, **given: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    leaves = [x.requires_grad_(), *(one.double() for one in layer.parameters())]
    names = PassesConfig() if passes else PassesConfig(attention=False, multihead=False)
    with Passes(names).rewriting():
        value = _attends(layer, **given)(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {"need_weights": True}),
        ({}, {"key_padding_mask": torch.zeros(BATCH, LENGTH, dtype=torch.bool)}),
        ({}, {"attn_mask": torch.zeros(BATCH * HEADS, LENGTH, LENGTH, dtype=torch.bool)}),
        ({"add_zero_attn": True}, {}),
        ({"add_bias_kv": True}, {}),
    ],
)
def test_what_is_not_plain_is_torchs_own_affair(
    options: dict[str, Any], given: dict[str, Any]
) -> None:
    layer = _layer(batch_first=True, **options)
    assert "multihead" not in _made(layer, **given)


def test_attention_to_something_else_is_torchs_own_affair() -> None:
    layer = _layer(batch_first=True)

    def function(x: Tensor, other: Tensor) -> Tensor:
        mixed: Tensor = layer.to(x.dtype)(x, other, other, need_weights=False)[0]
        return mixed.square().sum()

    x, other = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, 3, WIDTH)
    assert rewritten(function, x, other) == {"attention": 1}


def test_a_hint_without_a_mask_is_refused_as_ever() -> None:
    layer = _layer(batch_first=True)
    with pytest.raises(RuntimeError, match="attn_mask"), Passes(PassesConfig()).rewriting():
        _attends(layer, is_causal=True)(torch.randn(BATCH, LENGTH, WIDTH), *layer.parameters())


def test_no_gradient_is_padded() -> None:
    """Torch's own way sums three gradients that are padded with zeros."""
    layer = _layer(batch_first=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)

    def graph(switches: PassesConfig) -> set[str]:
        def gradient(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            leaves = [one.detach().requires_grad_() for one in (x, *parameters)]
            with Passes(switches).rewriting():
                return torch.autograd.grad(_attends(layer)(*leaves), leaves)

        nodes = make_fx(gradient)(x, *layer.parameters()).graph.nodes
        return {str(node.target) for node in nodes}

    assert "aten.select_backward.default" in graph(PassesConfig(multihead=False))
    assert "aten.select_backward.default" not in graph(PassesConfig())
