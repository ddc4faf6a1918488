"""What must be written out so that XLA's CPU devices share it.

torch_xla lowers batch and layer norms to XLA's batch norm operations. On the CPU, XLA's partitioner
meets them whole and does not cut them: it gathers their inputs, and every device goes on with the
whole batch. Written out as sums and products they are cut like everything else, and sums over the
batch become sums over devices. For TPUs they stay whole, as their compiler
has an expansion of its own (not yet run on hardware).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions

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
def spread_norms() -> dict[Any, Callable[..., Any]]:
    """Norms as simpler operations, forward and backward, as torch itself takes them apart."""
    return get_decompositions(_NORMS)
