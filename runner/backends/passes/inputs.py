"""A convolution under autocast reads a float32 batch as it is.

Autocast writes all images to memory once more, in bf16, to be read by the first convolution and by
its gradient. A TPU's matrix unit rounds what it multiplies to bf16 itself, at XLA's default
precision: the products are the same. The output has the autocast type, as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runner.backends.passes.rewrite import Function, Rewrite, autocast_type


class Inputs(Rewrite):
    """Convolutions of what needs no gradient."""

    calls = (torch.conv1d, torch.conv2d, torch.conv3d)

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.requires_grad:
            return proceed(*args, **kwargs)
        target = autocast_type(x)
        if target is None:
            return proceed(*args, **kwargs)
        self.count += 1
        with torch.autocast(x.device.type, enabled=False):
            return proceed(*args, **kwargs).to(target)
