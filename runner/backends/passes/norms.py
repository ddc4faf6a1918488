"""Norms under autocast: statistics in float32, the output in the type of the input.

Autocast computes norms in float32 and leaves their outputs there, so that activations, pooling
and the residual stream behind them carry twice the bytes. Here the output of a norm of bf16 is
bf16; gradients follow. Not exact: the output is rounded once more, to the precision asked for.
Without autocast nothing changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runner.backends.passes.rewrite import Function, Rewrite, autocast_type


class Norms(Rewrite):
    """Batch, layer, group, instance and RMS norm."""

    calls = (
        torch.batch_norm,
        torch.layer_norm,
        torch.group_norm,
        torch.instance_norm,
        torch.rms_norm,
    )

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dtype != autocast_type(x):
            return proceed(*args, **kwargs)
        self.count += 1
        return proceed(x.float(), *args[1:], **kwargs).to(x.dtype)
