"""Gradients that torch_xla 2.9.0 gets wrong, or refuses, written out for every backend.

Its `elu_backward`, which `celu` has as well, takes the input for the output. Its `selu` is an
operation of its own, of which torch knows no gradient. Its batch norm with statistics that are held
fast, as in fine-tuning, has no backward pass: the statistics that it looks for are a batch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Klambauer et al., "Self-Normalizing Neural Networks", 2017.
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

_library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def _elu_backward(
    grad: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor
) -> Tensor:
    if is_result:
        slope = input_scale * (x + alpha * scale)
    else:
        # Of large x the exponential, which nothing reads, has a gradient that is not a number.
        slope = alpha * scale * input_scale * (x.clamp(max=0) * input_scale).exp()
    return grad * torch.where(x > 0, scale, slope)


def _selu(x: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten.elu(x, _SELU_ALPHA, _SELU_SCALE)
    return made


def _selu_in_place(x: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten.elu_(x, _SELU_ALPHA, _SELU_SCALE)
    return made


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Tensor:
    """Of x [batch, channels, ...], as `torch.batch_norm`."""
    if training or mean is None or variance is None or not torch.is_grad_enabled():
        rest = (weight, bias, mean, variance, training, momentum, eps, cudnn)
        whole: Tensor = torch._batch_norm_impl_index(x, *rest)[0]
        return whole
    factor = (variance + eps).rsqrt()
    factor = factor if weight is None else factor * weight
    summand = -mean * factor if bias is None else bias - mean * factor
    channels = (1, -1, *[1] * (x.dim() - 2))
    return (x * factor.view(channels) + summand.view(channels)).to(x.dtype)


def register_operations() -> None:
    """Has XLA devices differentiate these operations so; once a process."""
    kernels: dict[str, Callable[..., Tensor]] = {
        "batch_norm": _batch_norm,
        "elu_backward": _elu_backward,
        "selu": _selu,
        "selu_": _selu_in_place,
    }
    for name, kernel in kernels.items():
        _library.impl(name, kernel, "AutogradXLA")  # type: ignore[no-untyped-call]
