"""What a contestant of `scripts/bench step` is: a way of making training steps.

It owns its model and its batches on the device. It does not know how it is timed.
"""

from __future__ import annotations

import abc
import itertools
from typing import Any


class Contestant(abc.ABC):
    """Training steps of one model by one means.

    Attributes:
        updates: Optimizer updates that a call makes.
        parameters: Numbers that training changes.
    """

    updates = 1
    parameters = 0

    def __init__(self) -> None:
        self.counter = itertools.count(0)

    @abc.abstractmethod
    def start(self) -> None:
        """Bring weights, state and batches to the device, ready for the first call."""

    @abc.abstractmethod
    def call(self) -> Any:
        """Make `updates` updates on the next batches; do not wait. What `losses` reads."""

    @abc.abstractmethod
    def losses(self, made: Any) -> list[float]:
        """The losses of a call, read from the device."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Wait until the device has done everything that it was given."""

    def ended(self) -> None:  # noqa: B027
        """What the runner's loop leaves to the thread that waits for a step's end."""

    @abc.abstractmethod
    def compiles(self) -> tuple[int, float]:
        """XLA compiles in this process so far, and their seconds."""

    @abc.abstractmethod
    def programs(self) -> int:
        """Device programs started so far."""

    @abc.abstractmethod
    def memory(self) -> tuple[int, str]:
        """Bytes held on the device, and who says so: "runtime" or "state"."""
