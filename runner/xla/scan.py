"""Several steps as one loop on the device.

Source: `torch_xla/experimental/scan.py` (torch_xla 2.9.0), whose lowering to XLA's `While` is
used; unrolling gives the same numbers and ten times the compile time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch_xla.experimental import scan

Body = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]


class _GivenSeeds(TorchFunctionMode):
    """Hands `scan` our seed for each iteration instead of those that it would draw."""

    def __init__(self, seeds: Tensor) -> None:
        super().__init__()
        self._seeds = seeds

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.randint:
            return self._seeds
        return func(*args, **(kwargs or {}))


def scan_steps(
    body: Body, carry: Sequence[Tensor], *, inputs: Sequence[Tensor], seeds: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Run `body` once for each slice of the inputs.

    Args:
        body: From the carried tensors and one slice of each input to the next carried tensors
            and this iteration's outputs.
        carry: The carried tensors before the first iteration.
        inputs: Tensors of shape [iterations, ...].
        seeds: int64 of shape [iterations]: each iteration's seed for random operations.

    Returns:
        The carried tensors after the last iteration, and the outputs stacked: [iterations, ...].
    """
    with _GivenSeeds(seeds):
        last, outputs = scan._scan_impl_flat(body, list(carry), list(inputs))
    return list(last), list(outputs)
