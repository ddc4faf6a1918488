"""Norms under autocast: statistics in float32, the output in the type of the input.

Autocast computes norms in float32 and leaves their outputs there, so that activations, pooling
and the residual stream behind them carry twice the bytes. Here the output of a norm of bf16 is
bf16; gradients follow. Not exact: the output is rounded once more, to the precision asked for.
Without autocast nothing changes.

Of these norms batch norm in training and layer norm are written out, as torch_xla makes them one
operation of XLA's, which XLA's TPU compiler takes apart in a way that costs more: the gradient of a
layer norm goes through memory in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        if proceed == torch.layer_norm:
            return _layer_norm(*args, **kwargs)
        if proceed == torch.batch_norm:
            return _batch_norm(*args, **kwargs)
        return proceed(x.float(), *args[1:], **kwargs).to(x.dtype)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    over = tuple(range(-len(normalized_shape), 0))
    y: Tensor = _LayerNorm.apply(x, weight, bias, over, eps)[0]  # type: ignore[no-untyped-call]
    return y


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    if not training:
        rest = (weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
        return torch.batch_norm(x.float(), *rest).to(x.dtype)
    over = (0, *range(2, x.dim()))
    normed: Tensor
    normed, mean, variance = _BatchNorm.apply(x, weight, bias, over, eps)  # type: ignore[no-untyped-call]
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            unbiased = variance.flatten() * (count / max(count - 1, 1))
            running_mean.lerp_(mean.flatten().to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return normed


def _layer_moments(x: Tensor, over: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation, float32."""
    wide = x.float()
    mean = wide.mean(over, keepdim=True)
    return mean, ((wide - mean).square().mean(over, keepdim=True) + eps).rsqrt()


class _Norm(torch.autograd.Function):
    """From x, weight, bias, the dimensions of the statistics, eps, to the result and statistics."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.over, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, *output[1:])


class _LayerNorm(_Norm):
    """Weight and bias have the normalized sizes; returns mean and inverse deviation, too."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, over: tuple[int, ...], eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, inverse = _layer_moments(x, over, eps)
        y = (x.float() - mean) * inverse
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        return y.to(x.dtype), mean, inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants gradients of gradients
            mean, inverse = _layer_moments(x, ctx.over, ctx.eps)
        grad, normed = grads[0].float(), (x.float() - mean) * inverse
        leading = tuple(range(x.dim() - len(ctx.over)))
        to_bias = grad.sum(leading) if ctx.needs_input_grad[2] else None
        to_weight = (grad * normed).sum(leading) if ctx.needs_input_grad[1] else None
        grad = grad if weight is None else grad * weight
        along = normed * (grad * normed).mean(ctx.over, keepdim=True)
        to_x = inverse * (grad - grad.mean(ctx.over, keepdim=True) - along)
        return to_x.to(x.dtype), to_weight, to_bias, None, None


def _batch_moments(x: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, float32, by one pass over x, as in XLA's own."""
    wide = x.float()
    mean = wide.mean(over, keepdim=True)
    variance = wide.square().mean(over, keepdim=True) - mean.square()
    return mean, variance.clamp(min=0.0)


def _by_channel(weight: Tensor | None, x: Tensor) -> Tensor | float:
    return 1.0 if weight is None else weight.view(1, -1, *[1] * (x.dim() - 2))


class _BatchNorm(_Norm):
    """x is [batch, channels, ...]; returns mean and variance of the channels, too."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, over: tuple[int, ...], eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _batch_moments(x, over)
        factor = (variance + eps).rsqrt() * _by_channel(weight, x)
        summand = -mean * factor if bias is None else _by_channel(bias, x) - mean * factor
        return (x.float() * factor + summand).to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants gradients of gradients
            mean, variance = _batch_moments(x, ctx.over)
        inverse = (variance + ctx.eps).rsqrt()
        grad, wide = grads[0].float(), x.float()
        count = math.prod(x.shape[axis] for axis in ctx.over)
        total = grad.sum(ctx.over, keepdim=True)
        along = ((grad * wide).sum(ctx.over, keepdim=True) - mean * total) * inverse
        factor = inverse * _by_channel(weight, x)
        level, slope = factor * total / count, factor * along * inverse / count
        to_x = grad * factor - ((wide - mean) * slope + level)
        to_weight = along.reshape(-1) if ctx.needs_input_grad[1] else None
        to_bias = total.reshape(-1) if ctx.needs_input_grad[2] else None
        return to_x.to(x.dtype), to_weight, to_bias, None, None
