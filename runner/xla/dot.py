"""Matrix products over any number of dimensions as one operation: `torch.ops.runner.dot`.

torch_xla's `matmul` and `einsum` make one of the leading dimensions, one of those that stay and one
of those that are summed. What is computed from scores of attention then stands behind a reshape,
through which XLA's TPU compiler does not fuse. Source: `_xla_dot_general` (torch_xla 2.9.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runner.xla.binding import binding

Dims = Sequence[int]

_library: Any = torch.library.Library("runner", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "dot(Tensor left, Tensor right, int leading, int[] over_left, int[] over_right) -> Tensor"
)


def dot(left: Tensor, right: Tensor, *, leading: int, over: tuple[Dims, Dims]) -> Tensor:
    """Sums of products over some dimensions of each.

    Args:
        left: Any shape.
        right: Any shape, its first `leading` sizes those of `left`.
        leading: How many dimensions go together without being summed.
        over: The summed dimensions of `left` and those of `right`, from the last: -1, -2, ...

    Returns:
        [the leading dimensions, the other ones of `left`, the other ones of `right`].
    """
    if torch.is_grad_enabled():  # the operation has no gradient
        return _by_matmul(left, right, leading, *over)
    made: Tensor = torch.ops.runner.dot(left, right, leading, *map(list, over))
    return made


def _by_matmul(left: Tensor, right: Tensor, leading: int, *over: Dims) -> Tensor:
    one, other = (
        _matrix(side, leading, dims) for side, dims in zip((left, right), over, strict=True)
    )
    return torch.matmul(one, other.mT).reshape(_sizes(left, right, leading, *over))


def _matrix(side: Tensor, leading: int, over: Dims) -> Tensor:
    """[the leading dimensions, all that stay as one, all that are summed as one]."""
    stay = [dim for dim in range(leading - side.dim(), 0) if dim not in over]
    rows, columns = (math.prod(side.shape[dim] for dim in dims) for dims in (stay, over))
    moved = side.permute(*range(leading), *stay, *over)
    return moved.reshape(*side.shape[:leading], rows, columns)


def _sizes(left: Tensor, right: Tensor, leading: int, *over: Dims) -> list[int]:
    """Those of the product."""
    one, other = (
        [size for dim, size in enumerate(side.shape, -side.dim()) if dim not in dims]
        for side, dims in zip((left, right), over, strict=True)
    )
    return one + other[leading:]


def _on_xla(left: Tensor, right: Tensor, leading: int, *over: Dims) -> Tensor:
    if binding._xla_get_mat_mul_precision() != "default":  # which `_xla_dot_general` does not know
        return _by_matmul(left, right, leading, *over)
    together = list(range(leading))
    summed = [
        [dim % side.dim() for dim in dims] for side, dims in zip((left, right), over, strict=True)
    ]
    made: Tensor = binding._xla_dot_general(left, right, (tuple(summed), (together, together)))
    return made


def _described(left: Tensor, right: Tensor, leading: int, *over: Dims) -> Tensor:
    return left.new_empty(_sizes(left, right, leading, *over))


_library.impl("dot", _on_xla, "XLA")
_library.impl("dot", _by_matmul, "CPU")
_library.impl("dot", _described, "Meta")
