"""Signals to the parent: Ctrl-C once stops cleanly, twice stops now, SIGTERM preempts.

So does SIGHUP, which comes when the terminal closes, unless `nohup` has it ignored.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from runner.record.outcome import Attempt


class StopSignals:
    """While open, takes these signals and remembers them instead of acting.

    Attributes:
        interrupts: How often Ctrl-C was pressed.
        terminated: Whether SIGTERM or SIGHUP came.
    """

    def __init__(self) -> None:
        self.interrupts = 0
        self.terminated = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for in any way."""
        return self.terminated or self.interrupts > 0

    def verdict(self, attempt: Attempt) -> Attempt:
        """What an attempt that may have been stopped comes to: what its worker says."""
        return attempt

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
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
        if number == signal.SIGINT:
            self.interrupts += 1
        else:
            self.terminated = True
