"""What `torch.autocast("xla")` leaves out: attention.

On CPU and CUDA, autocast hands `scaled_dot_product_attention` its tensors in the lower type.
torch_xla 2.9.0 hands them on as they come, and torch refuses them when they differ: rotary
positions make queries and keys float32, and values stay bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as autocast hands it on: floating point of at most 32 bits becomes `dtype`."""
    narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if narrow else tensor


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    dtype = torch.get_autocast_dtype("xla")

    def low(value: Any) -> Any:
        return lowered(value, dtype) if isinstance(value, Tensor) else value

    with torch.autocast("xla", enabled=False):
        return F.scaled_dot_product_attention(
            *map(low, args), **{name: low(value) for name, value in kwargs.items()}
        )


def complete() -> None:
    """Has autocast on XLA devices cast what attention is given; once a process."""
    name, key = "scaled_dot_product_attention", "AutocastXLA"
    _library.impl(name, _attention, key)  # type: ignore[no-untyped-call]
