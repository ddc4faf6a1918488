"""Attention that never holds the scores: `torch.ops.runner.flash_attention` and its gradients.

On a TPU these are the kernels of `jax.experimental.pallas.ops.tpu.flash_attention`, which
`torch_xla.experimental.custom_kernel.flash_attention` (2.9.0) calls too; no other device has
them. Not yet run on hardware; the TPU compiler takes them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from runner.xla.pallas import Function, Kernel, Shape, kernel, shape_of

#: Lengths must be multiples of it; the kernels work on blocks of so many rows or more.
BLOCK = 128
_JAX = "jax.experimental.pallas.ops.tpu.flash_attention"
#: What a score that is not to be seen is set to. Source: `DEFAULT_MASK_VALUE` there.
_HIDDEN = -0.7 * torch.finfo(torch.float32).max

_library: Any = torch.library.Library("runner", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "flash_attention(Tensor query, Tensor key, Tensor value, bool causal, float scale)"
    " -> (Tensor mixed, Tensor total, Tensor top)"
)
_library.define(
    "flash_attention_gradients(Tensor query, Tensor key, Tensor value, Tensor mixed, Tensor total,"
    " Tensor top, Tensor grad, bool causal, float scale) -> (Tensor, Tensor, Tensor)"
)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, and what its gradients need.

    Args:
        query: [batch, heads, queries, width], float32 or bfloat16.
        key: [batch, heads, keys, width].
        value: [batch, heads, keys, width].
        causal: Whether a query sees no later keys.
        scale: Factor of the scores.

    Returns:
        The mixed values, shaped as `query`; and of the softmax, in float32 and [batch, heads,
        queries], the sums and the maxima of rows.
    """
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.runner.flash_attention(
        query, key, value, causal, scale
    )
    return made


def gradients(
    saved: tuple[Tensor, ...], grad: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Args:
        saved: Arguments and results of `flash_attention`, in order.
        grad: Gradient of the mixed values.
        causal: As it was there.
        scale: As it was there.
    """
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.runner.flash_attention_gradients(
        *saved, grad, causal, scale
    )
    return made


def model_flops(node: fx.Node) -> float:
    """FLOPs of a node's attention, or of its gradients, without scores computed again; else 0."""
    count = _MODEL_PRODUCTS.get(node.target)
    if count is None:
        return 0.0
    query, key = node.args[:2]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    return count * _products(query.meta["val"], key.meta["val"])


def _products(query: Tensor, key: Tensor) -> float:
    """FLOPs of one product over all pairs of a query and a key."""
    batch, heads, queries, width = query.shape
    return 2.0 * batch * heads * queries * key.shape[2] * width


def _block(length: int, limit: int) -> int:
    """The largest block that divides a length: a power of 2 times `BLOCK`, at most `limit`."""
    block = limit
    while length % block:
        block //= 2
    assert block >= BLOCK, length
    return block


# Limits of blocks are those of torch_xla's `FlashAttention.DEFAULT_BLOCK_SIZES`, from MaxText.
def forward_kernel(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Kernel:
    """To the mixed values, and the rows' sums and maxima in every lane."""
    rows, columns = query.shape[2], key.shape[2]
    like, seen = shape_of(query), shape_of(key)
    options = {
        "save_residuals": True,
        "causal": causal,
        "sm_scale": scale,
        "block_b": 1,
        "block_q": _block(rows, 512),
        "block_k_major": _block(columns, 512),
        "block_k": _block(columns, 512),
        "debug": False,
    }
    return kernel(
        Function(_JAX, "_flash_attention_impl", tuple(options.items())),
        (like, seen, seen, None, None),
        flops=2 * _products(query, key),
    )


def _gradient_kernel(
    name: str, query: Tensor, key: Tensor, *, how: dict[str, Any], count: int
) -> Kernel:
    like, seen = shape_of(query), shape_of(key)
    of_rows = Shape(like.sizes[:3], torch.float32)
    options = {**how, "mask_value": _HIDDEN, "debug": False}
    return kernel(
        Function(_JAX, name, tuple(options.items())),
        (like, seen, seen, None, None, of_rows, of_rows, like, of_rows),
        flops=count * _products(query, key),
    )


def query_kernel(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Kernel:
    """To the gradient of the query."""
    columns = key.shape[2]
    how = {
        "causal": causal,
        "sm_scale": scale,
        "block_q_major": _block(query.shape[2], 1024),
        "block_k_major": _block(columns, 512),
        "block_k": _block(columns, 256),
    }
    made = _gradient_kernel("_flash_attention_bwd_dq", query, key, how=how, count=3)
    # JAX repeats the last operand as often as a block has columns; the kernel reads `BLOCK`.
    *others, last = made.operands
    narrow = Shape((*last.sizes[:-1], BLOCK), last.dtype)
    return dataclasses.replace(made, operands=(*others, narrow))


def key_value_kernel(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Kernel:
    """To the gradients of key and value."""
    rows, columns = _block(query.shape[2], 512), _block(key.shape[2], 512)
    how = {
        "causal": causal,
        "sm_scale": scale,
        "block_q_major": rows,
        "block_q": rows,
        "block_k_major": columns,
        "block_k": columns,
    }
    return _gradient_kernel("_flash_attention_bwd_dkv", query, key, how=how, count=4)


def _on_tpu(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    run = forward_kernel(query, key, causal=causal, scale=scale)
    mixed, total, top = run(query, key, value)
    return mixed, total[..., 0].clone(), top[..., 0].clone()


def _gradients_on_tpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    total: Tensor,
    top: Tensor,
    grad: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    delta = (mixed.float() * grad.float()).sum(-1)
    total, top, delta = (_in_every_lane(rows) for rows in (total, top, delta))
    operands = (query, key, value, total, top, grad, delta)
    (to_query,) = query_kernel(query, key, causal=causal, scale=scale)(*operands)
    to_key, to_value = key_value_kernel(query, key, causal=causal, scale=scale)(*operands)
    return to_query, to_key, to_value


def _in_every_lane(rows: Tensor) -> Tensor:
    """[..., rows] as [..., rows, BLOCK]."""
    return rows.unsqueeze(-1).expand(*rows.shape, BLOCK).clone()


def _described(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    of_rows = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(query), of_rows, torch.empty_like(of_rows)


def _gradients_described(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_library.impl("flash_attention", _on_tpu, "XLA")
_library.impl("flash_attention", _described, "Meta")
_library.impl("flash_attention_gradients", _gradients_on_tpu, "XLA")
_library.impl("flash_attention_gradients", _gradients_described, "Meta")

_MODEL_PRODUCTS: dict[Any, int] = {
    torch.ops.runner.flash_attention.default: 2,
    torch.ops.runner.flash_attention_gradients.default: 4,
}
