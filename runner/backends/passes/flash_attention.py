"""Attention by a TPU's flash kernels, where a call suits them; off unless asked for.

Scores stay in on-chip memory block by block, in both passes (Dao et al., "FlashAttention",
2022). Calls that do not suit are left to the `attention` pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from runner.backends.passes.attention import Call
from runner.backends.passes.rewrite import Function, Held, Rewrite, transformed
from runner.record.errors import BackendError
from runner.xla import flash_attention

#: The widest head that the tests ask the TPU compiler about, on every chip.
_WIDEST = 256


class FlashAttention(Rewrite):
    """`F.scaled_dot_product_attention` without mask and dropout, on whole blocks."""

    calls = (torch._C._nn.scaled_dot_product_attention,)

    def __init__(self, parameters: Held, batch: Held) -> None:
        super().__init__(parameters, batch)
        self._refused: set[str] = set()

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        call = Call(*args, **kwargs).cast_low()
        reason = _unsuited(call)
        if reason:
            self._refused.add(reason)
            return proceed(*args, **kwargs)
        self.count += 1
        query = call.query
        key, value = (_repeated(tensor, call.groups) for tensor in (call.key, call.value))
        scale = 1 / math.sqrt(query.shape[-1]) if call.scale is None else call.scale
        flat = (_batched(tensor) for tensor in (query, key, value))
        mixed: Tensor = _Mix.apply(*flat, call.is_causal, scale)  # type: ignore[no-untyped-call]
        return mixed.reshape(query.shape)

    def check(self) -> None:
        """See `Rewrite`."""
        if not self.count:
            reasons = "; ".join(sorted(self._refused)) or "there is none"
            raise BackendError(
                "backend.passes.flash_attention=true, but no call of "
                f"scaled_dot_product_attention suits the kernel: {reasons}"
            )


def _unsuited(call: Call) -> str:
    """Why the kernel cannot do a call; "" if it can."""
    query, key = call.query, call.key
    block, width = flash_attention.BLOCK, query.shape[-1]
    if transformed():
        return "torch.func transforms it"
    if call.attn_mask is not None:
        return "it has a mask (attn_mask)"
    if call.dropout_p > 0:
        return f"it drops probabilities (dropout_p={call.dropout_p})"
    if not call.suits() or key.shape[-1] != call.value.shape[-1]:
        return "sizes or types of query, key and value differ"
    if query.dtype not in (torch.float32, torch.bfloat16):
        return f"it is in {query.dtype}"
    if query.shape[-2] % block or key.shape[-2] % block:
        return (
            f"lengths must be multiples of {block}; got {query.shape[-2]} queries and "
            f"{key.shape[-2]} keys"
        )
    if width > _WIDEST or (width > block and width % block):
        return f"a head must be at most {block} wide, or {_WIDEST}; got {width}"
    return ""


def _repeated(tensor: Tensor, times: int) -> Tensor:
    """Heads of keys or values beside each query head that shares them."""
    return tensor if times == 1 else tensor.repeat_interleave(times, -3)


def _batched(tensor: Tensor) -> Tensor:
    """[..., heads, rows, width] as [batch, heads, rows, width]."""
    return tensor.reshape(-1, *tensor.shape[-3:]) if tensor.dim() > 3 else tensor.unsqueeze(0)


class _Mix(torch.autograd.Function):
    """Attention over [batch, heads, rows, width]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
    ) -> Tensor:
        made = flash_attention.flash_attention(query, key, value, causal=causal, scale=scale)
        ctx.save_for_backward(query, key, value, *made)
        ctx.causal, ctx.scale = causal, scale
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackendError(
                "backend.passes.flash_attention must be false: the kernel has no gradients of "
                "gradients, which this loss asks for"
            )
        (grad,) = grads
        made = flash_attention.gradients(
            ctx.saved_tensors, grad, causal=ctx.causal, scale=ctx.scale
        )
        return *made, None, None
