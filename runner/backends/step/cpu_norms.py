"""Norms written out where XLA's CPU compiler makes too little of its own operations.

torch_xla lowers batch and layer norms to XLA's batch norm operations. Two things become of these
on the CPU:

On one device, the sums of the backward pass over all but the channels are loops with a stride, one
for each channel, and each of them computes the inputs of the sum anew. As a product with ones, of
inputs that a barrier keeps, a sum is a pass over memory.

On several, XLA's partitioner meets the operations whole and does not cut them: it gathers their
inputs, and every device goes on with the whole batch. Written out as sums and products they are cut
like everything else, and sums over the batch become sums over devices.

For TPUs float32 norms stay whole, as their compiler has an expansion of its own (not yet run on
hardware). Layer norms of bf16, and in training batch norms, are written out by a pass before they
get here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

from runner.backends.sharding import Sharding
from runner.xla import device
from runner.xla.barrier import barrier

#: An operation, and what computes the same in other operations, or returns NotImplemented.
Decompositions = Mapping[Any, Callable[..., Any]]

aten = torch.ops.aten
_NORMS = (
    aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit_no_training,
    aten._native_batch_norm_legit,
    aten.native_batch_norm,
    aten.native_batch_norm_backward,
    aten.native_group_norm,
    aten.native_group_norm_backward,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
)


@functools.cache
def spread_norms() -> Decompositions:
    """For several devices: norms, forward and backward, as torch itself takes them apart."""
    return get_decompositions(_NORMS)


def _batch_norm_backward(
    gradient: Tensor,
    values: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    mean: Tensor | None,
    inverse_deviation: Tensor | None,
    train: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Any:
    """`aten.native_batch_norm_backward` of a trained (N, C, H, W) float32 batch."""
    plain = values.ndim == 4 and values.dtype == gradient.dtype == torch.float32
    if not (plain and train and all(wanted)):
        return NotImplemented
    assert weight is not None
    assert mean is not None
    assert inverse_deviation is not None
    channels = values.shape[1]
    samples = values.numel() // channels

    def sums(tensor: Tensor) -> Tensor:
        rows = tensor.permute(0, 2, 3, 1).reshape(samples, channels)
        return (rows.new_ones(1, samples) @ rows).reshape(channels)

    def over_channels(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, channels, 1, 1)

    (gradient,) = barrier([gradient])
    centered = values - over_channels(mean)
    (products,) = barrier([gradient * centered])
    bias_gradient, product_sums = sums(gradient), sums(products)
    slope = product_sums * inverse_deviation * inverse_deviation / samples
    rest = gradient - over_channels(bias_gradient / samples) - centered * over_channels(slope)
    gradient_in = rest * over_channels(weight * inverse_deviation)
    return gradient_in, product_sums * inverse_deviation, bias_gradient


#: For one device.
QUICK_NORMS: Decompositions = {aten.native_batch_norm_backward.default: _batch_norm_backward}

#: As torch_xla lowers them.
WHOLE_NORMS: Decompositions = types.MappingProxyType({})


def norms_for(sharding: Sharding) -> Decompositions:
    """The norms that the compiler of the process's device would rather have written out."""
    if not device.is_cpu():
        return WHOLE_NORMS
    return spread_norms() if sharding.mesh.axes else QUICK_NORMS
