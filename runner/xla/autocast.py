"""What `torch.autocast("xla")` leaves out.

On CUDA, autocast casts what goes into attention to the lower type, computes more losses in
float32, and hands the widest type of its operands to operations that take only one. torch_xla
2.9.0 does not, so that a model fails whose types autocast itself has mixed: rotary positions make
queries and keys float32 beside bf16 values; a norm's output is scattered into a float32 tensor.
The list of promoted operations is CUDA's and those of the same kind; operations in place, which
CUDA leaves to the user, take the type of what they change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_LOWER = ("scaled_dot_product_attention",)
_FLOAT32 = ("cosine_similarity", "huber_loss", "poisson_nll_loss")
_WIDEST = (
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "grid_sampler",
    "index_add",
    "index_put",
    "lerp.Scalar",
    "lerp.Tensor",
    "masked_scatter",
    "scatter.src",
    "scatter_add",
    "scatter_reduce.two",
    "tensordot",
    "vdot",
    "where.self",
)
_IN_PLACE = (
    "index_add_",
    "index_copy_",
    "index_put_",
    "lerp_.Scalar",
    "lerp_.Tensor",
    "masked_scatter_",
    "scatter_.src",
    "scatter_add_",
    "scatter_reduce_.two",
)

_library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def cast_low(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as autocast hands it on: floating point of at most 32 bits becomes `dtype`."""
    return tensor.to(dtype) if _is_cast(tensor) else tensor


def switched_off() -> torch.autocast:
    """Autocast off: a graph that was traced has its casts within itself."""
    return torch.autocast("xla", enabled=False)


def register_operations() -> None:
    """Has autocast on XLA devices cast these operations' tensors; once a process."""
    chosen: dict[tuple[str, ...], Callable[[list[Tensor]], torch.dtype]] = {
        _LOWER: lambda _: torch.get_autocast_dtype("xla"),
        _FLOAT32: lambda _: torch.float32,
        _WIDEST: lambda tensors: _widest(tensor.dtype for tensor in tensors),
        _IN_PLACE: lambda tensors: tensors[0].dtype,
    }
    for names, choose in chosen.items():
        for name in names:
            kernel = functools.partial(_cast, _operation(name), choose)
            _library.impl(name, kernel, "AutocastXLA")  # type: ignore[no-untyped-call]


def _cast(
    operation: Callable[..., Any],
    choose: Callable[[list[Tensor]], torch.dtype],
    *args: Any,
    **kwargs: Any,
) -> Any:
    values, form = pytree.tree_flatten((args, kwargs))
    tensors = [one for one in values if isinstance(one, Tensor) and _is_cast(one)]
    with switched_off():
        if tensors:
            dtype = choose(tensors)
            values = [cast_low(one, dtype) if isinstance(one, Tensor) else one for one in values]
            args, kwargs = pytree.tree_unflatten(values, form)
        return operation(*args, **kwargs)


def _is_cast(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


def _operation(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found
