"""A step's numbers (learning rates, seeds) as tensors on the host, made once.

Making a tensor takes the host long where nothing is in its caches, as between two steps of a
model; writing into one that exists takes next to nothing.
"""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch
from torch import Tensor

#: Calls until a tensor is written again: more than can be under way at a time.
_KEPT = 8


class HostNumbers:
    """Takes the numbers of each call, and gives them as a tensor.

    Args:
        count: Numbers a call; for a single one the tensor is 0-d.
        whole: Whether they are int64, not float32.
    """

    def __init__(self, count: int, *, whole: bool = False) -> None:
        self._numbers = array.array("q" if whole else "f", [0] * (_KEPT * count))
        dtype = torch.int64 if whole else torch.float32
        rows = torch.frombuffer(self._numbers, dtype=dtype).view(_KEPT, count)
        self._tensors = list((rows[:, 0] if count == 1 else rows).unbind())
        self._count = count
        self._next = 0

    def __call__(self, numbers: Sequence[float]) -> Tensor:
        """A tensor of these numbers, theirs for the next calls."""
        current = self._next
        self._next = (current + 1) % _KEPT
        for place, number in enumerate(numbers, current * self._count):
            self._numbers[place] = number  # type: ignore[call-overload]
        return self._tensors[current]
