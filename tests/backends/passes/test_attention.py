"""Attention by way of its pass has the values and gradients of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from runner.backends.passes.pipeline import Passes
from runner.config.schema import PassesConfig
from tests.backends.passes.compare import rewritten

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 6, 8


def _heads(count: int = HEADS, length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, count, length, WIDTH)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _weighed(**options: Any) -> Callable[..., Tensor]:
    """A scalar of attention that every element of its result counts in differently."""

    def function(query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(query, key, value, *mask, **options)
        weights = torch.linspace(-1, 2, mixed.numel(), dtype=mixed.dtype).view(mixed.shape)
        return (mixed * weights).sum()

    return function


def _sees() -> Tensor:
    """A mask in which one query sees nothing and another one everything."""
    mask = torch.rand(LENGTH, LENGTH) > 0.5
    mask[1], mask[2] = False, True
    return mask


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "enable_gqa": True}]
)
@pytest.mark.parametrize("keys", [LENGTH, LENGTH + 3])
def test_plain_causal_and_scaled(options: dict[str, Any], keys: int) -> None:
    shared = HEADS // 2 if "enable_gqa" in options else HEADS
    inputs = (_heads(), _heads(shared, keys), _heads(shared, keys))
    assert rewritten(_weighed(**options), *inputs) == {"attention": 1}


@pytest.mark.parametrize("shape", [(LENGTH,), (BATCH, 1, 1, LENGTH), (BATCH, HEADS, 1, LENGTH)])
@pytest.mark.parametrize("grouped", [False, True])
def test_masks_that_are_the_same_for_every_query(shape: tuple[int, ...], grouped: bool) -> None:
    shared = HEADS // 2 if grouped else HEADS
    inputs = (_heads(), _heads(shared), _heads(shared), torch.randn(shape))
    assert rewritten(_weighed(enable_gqa=grouped), *inputs) == {"attention": 1}


@pytest.mark.parametrize("shape", [(), (BATCH, 1), (BATCH, HEADS)])
@pytest.mark.parametrize("grouped", [False, True])
def test_masks_of_bools_a_query_that_sees_nothing_included(
    shape: tuple[int, ...], grouped: bool
) -> None:
    shared = HEADS // 2 if grouped else HEADS
    mask = _sees().expand(*shape, LENGTH, LENGTH)
    inputs = (_heads(), _heads(shared), _heads(shared), mask)
    assert rewritten(_weighed(enable_gqa=grouped), *inputs) == {"attention": 1}


@pytest.mark.parametrize("shape", [(), (HEADS,), (BATCH, 1)])
@pytest.mark.parametrize("grouped", [False, True])
def test_masks_of_numbers_have_gradients(shape: tuple[int, ...], grouped: bool) -> None:
    shared = HEADS // 2 if grouped else HEADS
    mask = torch.randn(*shape, LENGTH, LENGTH)
    inputs = (_heads(), _heads(shared), _heads(shared), mask)
    assert rewritten(_weighed(enable_gqa=grouped), *inputs) == {"attention": 1}


def test_inside_multihead_attention() -> None:
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def function(x: Tensor) -> Tensor:
        mixed: Tensor = layer.to(x.dtype)(x, x, x, need_weights=False)[0]
        return mixed.square().sum()

    assert rewritten(function, torch.randn(BATCH, LENGTH, WIDTH))["attention"] == 1


def test_a_checkpointed_part_is_computed_again_the_same_way() -> None:
    plain = _weighed(is_causal=True)

    def function(*inputs: Tensor) -> Tensor:
        result: Tensor = checkpoint(plain, *inputs, use_reentrant=False)
        return result

    assert rewritten(function, _heads(), _heads(), _heads()) == {"attention": 2}


def test_gradients_have_gradients() -> None:
    plain = _weighed(is_causal=True)

    def function(*inputs: Tensor) -> Tensor:
        first = torch.autograd.grad(plain(*inputs), inputs, create_graph=True)
        return sum((one.square().sum() for one in first), torch.zeros(()))

    assert rewritten(function, _heads(), _heads(), _heads())["attention"] == 1


@pytest.mark.parametrize("shared", [HEADS, HEADS // 2])
def test_dropout_drops_the_same_in_both_directions(shared: int) -> None:
    rate, inputs = 0.5, [_heads(count).double() for count in (HEADS, shared, shared)]
    keep = torch.dropout(torch.ones(BATCH, HEADS, LENGTH, LENGTH).double(), rate, True)

    def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (one.repeat_interleave(HEADS // shared, 1) for one in (key, value))
        scores = query @ key.transpose(-2, -1) / WIDTH**0.5
        return ((scores.softmax(-1) * keep) @ value).square().sum()

    def by_pass(*heads: Tensor) -> Tensor:
        torch.manual_seed(1)
        return _dropped(*heads, rate=rate, grouped=shared < HEADS).square().sum()

    torch.manual_seed(1)
    keep = torch.dropout(torch.ones_like(keep), rate, True)
    leaves = [one.requires_grad_() for one in inputs]
    with Passes(PassesConfig()).rewriting():
        got = torch.autograd.grad(by_pass(*leaves), leaves)
    expected = torch.autograd.grad(by_hand(*leaves), leaves)
    assert (keep == 0).any()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def _dropped(*heads: Tensor, rate: float, grouped: bool) -> Tensor:
    return F.scaled_dot_product_attention(*heads, dropout_p=rate, enable_gqa=grouped)


def test_what_it_does_not_know_is_torchs_own_affair() -> None:
    def broadcast(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key[:1], value[:1]).square().sum()

    assert rewritten(broadcast, _heads(), _heads(), _heads()) == {}


def test_under_autocast_all_of_it_is_in_its_type() -> None:
    """Queries and keys that were rotated in float32, values as a linear layer left them."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 8, 16).unbind()
    value = value.to(torch.bfloat16)
    leaves = [one.requires_grad_() for one in (query, key, value)]
    passes, kept = Passes(PassesConfig()), []
    with passes.rewriting(), torch.autocast("cpu", torch.bfloat16):
        with saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            got = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        found = torch.autograd.grad(got.float().square().sum(), leaves)
    exact = F.scaled_dot_product_attention(query, key, value.float(), is_causal=True)
    expected = torch.autograd.grad(exact.square().sum(), leaves)
    assert passes.made == {"attention": 1}
    assert got.dtype == torch.bfloat16
    assert kept
    assert {one.dtype for one in kept if one.shape[-1] > 1} == {torch.bfloat16}
    torch.testing.assert_close(got.float(), exact, rtol=2e-2, atol=2e-2)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 2e-2 * other.norm()


@pytest.mark.parametrize("of", [lambda q: q, lambda q: 2 * q, lambda q: q.sin()])
def test_gradients_of_gradients_where_keys_are_made_of_queries(
    of: Callable[[Tensor], Tensor],
) -> None:
    def penalty(query: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(query, of(query), of(query))
        (gradient,) = torch.autograd.grad(mixed.square().sum(), query, create_graph=True)
        return gradient.square().sum()

    assert rewritten(penalty, _heads()) == {"attention": 1}


def test_what_it_gives_may_be_changed_in_place() -> None:
    def halved(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value).mul_(0.5).square().sum()

    assert rewritten(halved, _heads(), _heads(), _heads()) == {"attention": 1}


def test_masks_that_are_no_plain_tensor_are_torchs_own_affair() -> None:
    query, key, value = _heads(), _heads(), _heads()
    mask = causal_lower_right(query.shape[-2], key.shape[-2])
    passes = Passes(PassesConfig())
    with passes.rewriting():
        got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(got, expected)
    assert passes.made == {}


@pytest.mark.parametrize(
    "shape", [(2, BATCH, HEADS, 1, LENGTH), (HEADS // 2, LENGTH, LENGTH), (LENGTH, LENGTH - 1)]
)
def test_masks_that_do_not_fit_are_torchs_own_affair(shape: tuple[int, ...]) -> None:
    passes, shared = Passes(PassesConfig()), _heads(HEADS // 2)
    with passes.rewriting(), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(
            _heads(), shared, shared, attn_mask=torch.zeros(shape), enable_gqa=True
        )
    assert passes.made == {}


def test_without_keys_there_is_nothing_to_see() -> None:
    passes, query = Passes(PassesConfig()), _heads()
    with passes.rewriting():
        got = F.scaled_dot_product_attention(query, query[..., :0, :], query[..., :0, :])
    assert not got.any()


def test_under_transforms_of_torch_func_it_is_torchs_own() -> None:
    def total(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value).square().sum()

    inputs = _heads(), _heads(), _heads()
    passes = Passes(PassesConfig())
    with passes.rewriting():
        found = torch.func.grad(total)(*inputs)
        each = torch.func.vmap(torch.func.grad(total))(*inputs)
    torch.testing.assert_close(found, torch.func.grad(total)(*inputs))
    torch.testing.assert_close(each, found)
    assert passes.made == {}
