"""Attention whose backward pass takes the row sum of dP * P as that of dO * O.

Left to autograd, the sum over keys that the softmax's backward pass needs becomes a windowed
reduction inside both matrix products behind it. The sum of dO * O over a head's width is the
same number, and a row is divided by its sum of exponentials once it is as short as a head is wide
(Dao et al., "FlashAttention", 2022, appendix B). Scores and exponentials are float32, the latter
are kept in the inputs' type, and heads that share keys and values stay together, as a dimension
that these do not have, instead of having them copied. No tensor of scores is reshaped between a
product and what is computed from it, so that XLA fuses them. Exact in float32 but for the order of
sums and of the scaling; in bf16 less is rounded than in torch's own way, which scales both factors
and rounds the scores. Where softmax is all but 1 at one key, the two sums no longer cancel to the
last bit.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from runner.backends.passes.rewrite import Function, Rewrite, autocast_type, transformed
from runner.xla.autocast import cast_low
from runner.xla.dot import dot

_NOTHING = float("-inf")


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def cast_low(self) -> Call:
        """The call with query, key and value as autocast, which comes later, would cast them."""
        target = autocast_type(self.query)
        if target is None:
            return self
        query, key, value = (cast_low(one, target) for one in (self.query, self.key, self.value))
        return dataclasses.replace(self, query=query, key=key, value=value)

    def suits(self) -> bool:
        """Whether it is a plain case: same leading sizes, whole groups of heads, not empty."""
        query, key, value, mask = self.query, self.key, self.value, self.attn_mask
        if not query.dtype == key.dtype == value.dtype or query.dim() < 3:
            return False
        if isinstance(mask, CausalBias) or (self.is_causal and mask is not None):
            return False
        if key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
            return False
        if 0 in (*query.shape, *key.shape, *value.shape):
            return False
        if mask is not None and not _fits(mask, (*query.shape[:-1], key.shape[-2])):
            return False
        if not self.enable_gqa:
            return query.shape[:-2] == key.shape[:-2]
        alike = query.dim() == key.dim() >= 4 and query.shape[:-3] == key.shape[:-3]
        return alike and query.shape[-3] % key.shape[-3] == 0

    @property
    def groups(self) -> int:
        """Query heads for each head of keys and values."""
        return self.query.shape[-3] // self.key.shape[-3] if self.enable_gqa else 1


def _fits(mask: Tensor, scores: tuple[int, ...]) -> bool:
    """Whether a mask broadcasts to the scores' sizes without making these more."""
    pairs = zip(reversed(mask.shape), reversed(scores), strict=False)
    return mask.dim() <= len(scores) and all(size in (1, whole) for size, whole in pairs)


class Attention(Rewrite):
    """`F.scaled_dot_product_attention`, and so `nn.MultiheadAttention` without its weights."""

    calls = (torch._C._nn.scaled_dot_product_attention,)

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        call = Call(*args, **kwargs).cast_low()
        if transformed() or not call.suits():
            return proceed(*args, **kwargs)
        self.count += 1
        width = call.query.shape[-1]
        how = _How(
            scale=1 / math.sqrt(width) if call.scale is None else call.scale,
            causal=call.is_causal,
            leading=call.key.dim() - 2,
            keep=_kept(call) if call.dropout_p > 0 else None,
        )
        query, mask = _by_group(call.query, call.groups), call.attn_mask
        if mask is not None:
            mask = _by_group(mask, call.groups)
        mixed: Tensor = _Mix.apply(query, call.key, call.value, mask, how)  # type: ignore[no-untyped-call]
        return mixed.flatten(-4, -3) if call.groups > 1 else mixed


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """[..., heads, rows, n] as [..., heads of keys, groups, rows, n]; a mask may have one head."""
    if groups == 1 or tensor.dim() < 3:
        return tensor
    *leading, heads, rows, columns = tensor.shape
    shared = (1, 1) if heads == 1 else (heads // groups, groups)
    return tensor.reshape(*leading, *shared, rows, columns)


def _kept(call: Call) -> Tensor:
    """What dropout multiplies probabilities by, of the scores' shape."""
    query, key = call.query, call.key
    ones = query.new_ones((*query.shape[:-1], key.shape[-2]), dtype=_wide(query))
    return _by_group(torch.dropout(ones, call.dropout_p, True), call.groups)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclasses.dataclass(frozen=True)
class _How:
    """What attention does besides its tensors.

    Attributes:
        scale: Factor of the scores.
        causal: Whether a query sees no later keys.
        leading: Dimensions that queries and keys share; heads of a group come after these.
        keep: What dropout multiplies probabilities by, or None.
    """

    scale: float
    causal: bool
    leading: int
    keep: Tensor | None

    def shares(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a row takes of each key, at most 1, and the row's sum [..., rows, 1]; float32.

        A row that sees no key is all 0, and its sum 1.
        """
        if query.dtype == _wide(query):
            scores = self.met(query, self.scaled(key))
        else:
            scores = self.met(query, key).to(_wide(query)) * self.scale
        if self.causal:
            scores = torch.where(_earlier(scores), scores, _NOTHING)
        elif mask is not None and mask.dtype == torch.bool:
            scores = torch.where(mask, scores, _NOTHING)
        elif mask is not None:
            scores = scores + mask
        top = scores.amax(-1, keepdim=True)
        if mask is not None:
            top = torch.where(top == _NOTHING, 0.0, top)
        shares = (scores - top).exp()
        total = shares.sum(-1, keepdim=True)
        if mask is not None:
            total = torch.where(total == 0, 1.0, total)
        return shares, total

    def scaled(self, tensor: Tensor) -> Tensor:
        """The tensor times the scale.

        In float32 it is a factor of a matrix product that is scaled, smaller than the product; and
        XLA's CPU compiler makes far more code of a transposed copy that computes nothing.
        """
        return tensor * self.scale

    def kept(self, shares: Tensor) -> Tensor:
        """Shares after dropout, or gradients of those before it."""
        return shares if self.keep is None else shares * self.keep

    def met(self, rows: Tensor, keys: Tensor) -> Tensor:
        """[..., rows, n] and [..., keys, n] as [..., rows, keys]."""
        return dot(rows, keys, leading=self.leading, over=([-1], [-1]))

    def taken(self, shares: Tensor, keys: Tensor) -> Tensor:
        """[..., rows, keys] and [..., keys, n] as [..., rows, n]."""
        return dot(shares, keys, leading=self.leading, over=([-1], [-2]))

    def given(self, shares: Tensor, rows: Tensor) -> Tensor:
        """[..., rows, keys] and [..., rows, n] as [..., keys, n], summed over a group's heads."""
        over = range(self.leading - rows.dim(), -1)
        return dot(shares, rows, leading=self.leading, over=(over, over))


def _earlier(scores: Tensor) -> Tensor:
    """Which keys a causal query sees: [queries, keys]."""
    queries, keys = (
        torch.arange(size, dtype=torch.int32, device=scores.device) for size in scores.shape[-2:]
    )
    return queries.unsqueeze(1) >= keys


class _Mix(torch.autograd.Function):
    """Attention over queries [..., queries, width], keys and values [..., keys, width].

    Of heads that share keys, queries are [..., groups, queries, width].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: _How
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            shares, total = how.shares(query, key, mask)
            mixed = _mixed(how, shares, total, value)
        ctx.save_for_backward(query, key, value, mask, shares.to(query.dtype), total, mixed)
        ctx.how = how
        # The user may change what he gets in place.
        return mixed.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        with torch.autocast(grad.device.type, enabled=False):
            if torch.is_grad_enabled():  # somebody wants gradients of gradients
                return *_differentiable(ctx, grad), None
            return *_gradients(ctx, grad), None


def _mixed(how: _How, shares: Tensor, total: Tensor, value: Tensor) -> Tensor:
    """The values that each row takes, [..., rows, width]."""
    made = how.taken(how.kept(shares).to(value.dtype), value)
    return (made.to(total.dtype) / total).to(value.dtype)


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients of query, key, value and mask."""
    query, key, value, mask, shares, total, mixed = ctx.saved_tensors
    how: _How = ctx.how
    wide = _wide(query)
    weight = 1 / total
    weighted = (grad.to(wide) * weight).to(grad.dtype)
    to_value = how.given(how.kept(shares).to(value.dtype), weighted)
    delta = (grad.to(wide) * mixed.to(wide)).sum(-1, keepdim=True)
    to_mask = None
    if query.dtype == wide and not ctx.needs_input_grad[3]:
        to_shares = how.kept(how.met(grad, how.scaled(value)))
        to_dots = shares * ((to_shares - how.scaled(delta)) * weight)
    else:
        to_shares = how.kept(how.met(grad, value).to(wide))
        to_scores = shares.to(wide) * ((to_shares - delta) * weight)
        if ctx.needs_input_grad[3]:
            to_mask = to_scores.sum_to_size(mask.shape).to(mask.dtype)
        to_dots = how.scaled(to_scores).to(query.dtype)
    to_query, to_key = how.taken(to_dots, key), how.given(to_dots, query)
    return [to_query, to_key, to_value, to_mask]


def _differentiable(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The same gradients, by autograd, so that they have gradients themselves."""
    *saved, _, _, _ = ctx.saved_tensors
    # Of themselves alone: a key may have been computed from the query.
    inputs: list[Any] = [None if one is None else one.view_as(one) for one in saved]
    query, key, value, mask = inputs
    how: _How = ctx.how
    shares, total = how.shares(query, key, mask)
    mixed = _mixed(how, shares, total, value)
    wanted = [one for one, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(mixed, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]
