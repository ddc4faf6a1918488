"""Matrix products over any number of leading dimensions as one operation: `torch.ops.runner.dot`.

torch_xla's `matmul` makes one of the leading dimensions. What is computed from scores of attention
then stands behind a reshape, through which XLA's TPU compiler does not fuse. Source:
`_xla_dot_general` (torch_xla 2.9.0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runner.xla.binding import binding

_library: Any = torch.library.Library("runner", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("dot(Tensor left, Tensor right, int over_left, int over_right) -> Tensor")


def dot(left: Tensor, right: Tensor, *, over: tuple[int, int]) -> Tensor:
    """Sums of products over a dimension of each.

    Args:
        left: [..., a, b].
        right: [..., c, d], the same leading sizes.
        over: The dimension of `left` and that of `right`, -2 or -1.

    Returns:
        [..., the other dimension of `left`, the other one of `right`].
    """
    if torch.is_grad_enabled():  # the operation has no gradient
        return _by_matmul(left, right, *over)
    made: Tensor = torch.ops.runner.dot(left, right, *over)
    return made


def _by_matmul(left: Tensor, right: Tensor, over_left: int, over_right: int) -> Tensor:
    left = left if over_left == -1 else left.transpose(-2, -1)
    return torch.matmul(left, right if over_right == -2 else right.transpose(-2, -1))


def _on_xla(left: Tensor, right: Tensor, over_left: int, over_right: int) -> Tensor:
    if binding._xla_get_mat_mul_precision() != "default":  # which `_xla_dot_general` does not know
        return _by_matmul(left, right, over_left, over_right)
    leading = list(range(left.dim() - 2))
    over = ([left.dim() + over_left], [right.dim() + over_right])
    made: Tensor = binding._xla_dot_general(left, right, (over, (leading, leading)))
    return made


def _described(left: Tensor, right: Tensor, over_left: int, over_right: int) -> Tensor:
    free = left.shape[-3 - over_left], right.shape[-3 - over_right]
    return left.new_empty((*left.shape[:-2], *free))


_library.impl("dot", _on_xla, "XLA")
_library.impl("dot", _by_matmul, "CPU")
_library.impl("dot", _described, "Meta")
