"""A convolution under autocast reads a float32 batch as it is.

Autocast writes all images to memory once more, in bf16, to be read by the first convolution and by
its gradient. A TPU's matrix unit rounds what it multiplies to bf16 itself, at XLA's default
precision (not yet run on hardware). The output has the autocast type, as ever. Where windows do
not overlap the copy stays: XLA puts such images in another order first, which is less in bf16.

A CPU multiplies float32 as it is, so gradients there would not be those of a TPU: programs that
run on a CPU are made without this pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runner.backends.passes.rewrite import Function, Rewrite, autocast_type


class Inputs(Rewrite):
    """Convolutions of the batch."""

    calls = (torch.conv1d, torch.conv2d, torch.conv3d)

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x not in self.batch or not _suits(*args, **kwargs):
            return proceed(*args, **kwargs)
        self.count += 1
        target = autocast_type(x)
        with torch.autocast(x.device.type, enabled=False):
            return proceed(*args, **kwargs).to(target)


def _suits(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    *_: Any,
    **__: Any,
) -> bool:
    """Whether a convolution's windows overlap on what would be cast."""
    wide = all(one is None or one.dtype == torch.float32 for one in (x, weight, bias))
    if weight is None or not wide or x.requires_grad:
        return False
    window = weight.shape[2:]
    strides = [stride] if isinstance(stride, int) else list(stride)
    strides = strides * len(window) if len(strides) == 1 else strides
    overlap = any(step < size for step, size in zip(strides, window, strict=True))
    return overlap and autocast_type(x) is not None
