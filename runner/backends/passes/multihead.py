"""Self-attention of `nn.MultiheadAttention` without copies into torch's own order of dimensions.

Torch puts the length before the batch and takes queries, keys and values from a stack of three,
whose gradient is a sum of three tensors that are padded with zeros. Here the batch stays first and
the three are cut from the last dimension, whose gradient is one concatenation. Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from runner.backends.passes.rewrite import Function, Rewrite

#: Arguments of `multi_head_attention_forward` with which a call is left as it is, if given.
_UNUSUAL = ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v")
_NAMES = (
    *("query", "key", "value", "embed_dim", "heads", "weight", "bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_weight", "out_bias"),
)


class MultiheadAttention(Rewrite):
    """`F.multi_head_attention_forward` of one tensor with itself, without its weights."""

    calls = (F.multi_head_attention_forward,)

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        given = dict(zip(_NAMES, args, strict=False)) | kwargs
        if len(args) != len(_NAMES) or not _suits(given):
            return proceed(*args, **kwargs)
        self.count += 1
        x, heads = given["query"].transpose(0, 1), given["heads"]
        parts = F.linear(x, given["weight"], given["bias"]).chunk(3, dim=-1)
        query, key, value = (
            part.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for part in parts
        )
        causal, mask = given.get("is_causal", False), given.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask  # a module's mask says what is hidden, a function's what is seen
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if causal else mask,
            dropout_p=given["dropout_p"] if given.get("training", True) else 0.0,
            is_causal=causal,
        )
        out: Tensor = F.linear(
            mixed.transpose(1, 2).flatten(-2), given["out_weight"], given["out_bias"]
        )
        return out.transpose(0, 1), None


def _suits(given: dict[str, Any]) -> bool:
    """Whether a call is the plain case: a batch, one packed weight, no mask or one for all."""
    query, mask = given["query"], given.get("attn_mask")
    if given["key"] is not query or given["value"] is not query or query.dim() != 3:
        return False
    if given.get("need_weights", True) or given.get("use_separate_proj_weight", False):
        return False
    if any(given.get(name) is not None for name in _UNUSUAL) or given["add_zero_attn"]:
        return False
    if mask is None:
        return not given.get("is_causal", False)  # torch refuses the hint alone
    return bool(mask.dim() == 2)
