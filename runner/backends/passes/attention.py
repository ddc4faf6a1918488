"""Attention whose backward pass takes the row sum of dP * P as that of dO * O.

Left to autograd, the sum over keys that the softmax's backward pass needs becomes a windowed
reduction inside both matrix products behind it. The sum of dO * O over a head's width is the
same number (Dao et al., "FlashAttention", 2022, appendix B). Scores and softmax are float32,
probabilities are kept in the inputs' type, and heads that share keys and values stay together
instead of having these copied. Exact in float32 but for the order of sums and of the scaling; in
bf16 less is rounded than in torch's own way, which scales both factors and rounds the scores.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from runner.backends.passes.rewrite import Function, Rewrite

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

    def suits(self) -> bool:
        """Whether it is a plain case: same leading sizes, whole groups of heads."""
        query, key, value = self.query, self.key, self.value
        if not query.dtype == key.dtype == value.dtype or query.dim() < 3:
            return False
        if self.is_causal and self.attn_mask is not None:
            return False
        if key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
            return False
        if not self.enable_gqa:
            return query.shape[:-2] == key.shape[:-2]
        alike = query.dim() == key.dim() >= 4 and query.shape[:-3] == key.shape[:-3]
        return alike and query.shape[-3] % key.shape[-3] == 0

    @property
    def groups(self) -> int:
        """Query heads for each head of keys and values."""
        return self.query.shape[-3] // self.key.shape[-3] if self.enable_gqa else 1


class Attention(Rewrite):
    """`F.scaled_dot_product_attention`, and so `nn.MultiheadAttention` without its weights."""

    calls = (torch._C._nn.scaled_dot_product_attention,)

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        call = Call(*args, **kwargs)
        if not call.suits():
            return proceed(*args, **kwargs)
        self.count += 1
        width = call.query.shape[-1]
        how = _How(
            scale=1 / math.sqrt(width) if call.scale is None else call.scale,
            causal=call.is_causal,
            groups=call.groups,
            keep=_kept(call) if call.dropout_p > 0 else None,
        )
        query, mask = call.query, call.attn_mask
        if how.groups > 1:
            query = _by_group(query, how.groups).flatten(-3, -2)
            if mask is not None:
                many = mask.dim() > 2 and mask.shape[-3] > 1
                mask = _by_group(mask, how.groups) if many else mask.unsqueeze(-3)
        mixed: Tensor = _Mix.apply(query, call.key, call.value, mask, how)  # type: ignore[no-untyped-call]
        if how.groups > 1:
            mixed = how.split(mixed).flatten(-4, -3)
        return mixed


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """[..., heads, a, b] as [..., heads of keys, groups, a, b]."""
    *leading, heads, rows, columns = tensor.shape
    return tensor.reshape(*leading, heads // groups, groups, rows, columns)


def _kept(call: Call) -> Tensor:
    """What dropout multiplies probabilities by, [..., heads of keys, groups, queries, keys]."""
    query, key = call.query, call.key
    ones = query.new_ones((*query.shape[:-1], key.shape[-2]), dtype=_wide(query))
    keep = torch.dropout(ones, call.dropout_p, True)
    return _by_group(keep, call.groups) if call.groups > 1 else keep


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclasses.dataclass(frozen=True)
class _How:
    """What attention does besides its tensors.

    Attributes:
        scale: Factor of the scores.
        causal: Whether a query sees no later keys.
        groups: Query heads for each head of keys, which lie one after another as more queries.
        keep: What dropout multiplies probabilities by, or None.
    """

    scale: float
    causal: bool
    groups: int
    keep: Tensor | None

    def split(self, rows: Tensor) -> Tensor:
        """Rows of all heads of a group apart: [..., groups, queries, n]."""
        if self.groups == 1:
            return rows
        *leading, count, width = rows.shape
        return rows.reshape(*leading, self.groups, count // self.groups, width)

    def kept(self, rows: Tensor) -> Tensor:
        """Gradients of probabilities before dropout, from those of a group's rows after it."""
        apart = self.split(rows)
        return apart if self.keep is None else apart * self.keep

    def join(self, rows: Tensor) -> Tensor:
        """Undoes `split`."""
        return rows.flatten(-3, -2) if self.groups > 1 else rows

    def probabilities(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """The softmax of the scores, float32; a row that sees no key is all 0."""
        if query.dtype == _wide(query):
            scores = self.split(torch.matmul(query, self.scaled(key).transpose(-2, -1)))
        else:
            scores = self.split(torch.matmul(query, key.transpose(-2, -1)).to(_wide(query)))
            scores = scores * self.scale
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
        return shares / total

    def scaled(self, tensor: Tensor) -> Tensor:
        """The tensor times the scale.

        In float32 it is a factor of a matrix product that is scaled, smaller than the product; and
        XLA's CPU compiler makes far more code of a transposed copy that computes nothing.
        """
        return tensor * self.scale

    def dropped(self, shares: Tensor, like: Tensor) -> Tensor:
        """Probabilities as they meet the values."""
        shares = shares if self.keep is None else shares * self.keep
        return self.join(shares).to(like.dtype)


def _earlier(scores: Tensor) -> Tensor:
    """Which keys a causal query sees: [queries, keys]."""
    queries, keys = (
        torch.arange(size, dtype=torch.int32, device=scores.device) for size in scores.shape[-2:]
    )
    return queries.unsqueeze(1) >= keys


class _Mix(torch.autograd.Function):
    """Attention over [..., groups * queries, width], keys and values [..., keys, width]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: _How
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            shares = how.probabilities(query, key, mask)
            mixed = torch.matmul(how.dropped(shares, value), value)
        ctx.save_for_backward(query, key, value, mask, shares.to(query.dtype), mixed)
        ctx.how = how
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        with torch.autocast(grad.device.type, enabled=False):
            if torch.is_grad_enabled():  # somebody wants gradients of gradients
                return *_differentiable(ctx, grad), None
            return *_gradients(ctx, grad), None


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients of query, key, value and mask."""
    query, key, value, mask, shares, mixed = ctx.saved_tensors
    how: _How = ctx.how
    to_value = torch.matmul(how.dropped(shares, value).transpose(-2, -1), grad)
    wide = _wide(query)
    delta = how.split((grad.to(wide) * mixed.to(wide)).sum(-1, keepdim=True))
    to_mask = None
    if query.dtype == wide and not ctx.needs_input_grad[3]:
        to_shares = how.kept(torch.matmul(grad, how.scaled(value).transpose(-2, -1)))
        to_dots = how.join(shares * (to_shares - how.scaled(delta)))
    else:
        to_shares = how.kept(torch.matmul(grad, value.transpose(-2, -1)).to(wide))
        to_scores = shares.to(wide) * (to_shares - delta)
        if ctx.needs_input_grad[3]:
            to_mask = to_scores.sum_to_size(mask.shape).to(mask.dtype)
        to_dots = how.join(how.scaled(to_scores)).to(query.dtype)
    to_query, to_key = torch.matmul(to_dots, key), torch.matmul(to_dots.transpose(-2, -1), query)
    return [to_query, to_key, to_value, to_mask]


def _differentiable(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The same gradients, by autograd, so that they have gradients themselves."""
    *inputs, _, _ = ctx.saved_tensors
    query, key, value, mask = inputs
    how: _How = ctx.how
    mixed = torch.matmul(how.dropped(how.probabilities(query, key, mask), value), value)
    wanted = [one for one, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(mixed, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]
