"""torch_xla's C++ binding, or a clear word on how to get it."""

from __future__ import annotations

from typing import Any

from runner.xla import autocast, gradients

try:
    import torch_xla
    from torch_xla.core import xla_model
except ImportError as error:
    raise ImportError(
        "the XLA backends need torch_xla, which fits torch by its exact version: "
        "pip install 'torch==2.9.0' 'torch_xla==2.9.0' (on a TPU VM 'torch_xla[tpu]==2.9.0')"
    ) from error

autocast.register_operations()
gradients.register_operations()

#: The extension module: graphs, hashes, counters, transfers. Untyped, and internal to torch_xla.
binding: Any = torch_xla._XLAC  # type: ignore[attr-defined]

__all__ = ["binding", "torch_xla", "xla_model"]
