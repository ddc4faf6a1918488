"""Signals to the parent: Ctrl-C once stops cleanly, twice stops now, SIGTERM preempts."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While open, takes SIGINT and SIGTERM and remembers them instead of acting.

    Attributes:
        interrupts: How often Ctrl-C was pressed.
        terminated: Whether SIGTERM came.
    """

    def __init__(self) -> None:
        self.interrupts = 0
        self.terminated = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for in any way."""
        return self.terminated or self.interrupts > 0

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.terminated = True
        else:
            self.interrupts += 1
