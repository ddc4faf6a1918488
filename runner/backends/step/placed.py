"""A batch on the device, with all that a step asks of it found out beforehand.

Made by the thread that brings batches, so that the one that starts steps looks nothing up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class PlacedBatch(dict[str, Tensor]):
    """Named tensors on the device.

    Args:
        on_host: The batch as it was; asking a device's tensor for its shape takes far longer.
        on_device: The same names.

    Attributes:
        tensors: In the order of their names.
        shapes: Theirs.
    """

    def __init__(self, on_host: Mapping[str, Tensor], on_device: Mapping[str, Tensor]) -> None:
        super().__init__(on_device)
        names = sorted(on_device)
        self.tensors = [on_device[name] for name in names]
        self.shapes: tuple[torch.Size, ...] = tuple(on_host[name].shape for name in names)
