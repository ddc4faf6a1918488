"""Signals become a flag that the loop looks at between two steps."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

from runner.record.errors import ExitCode, StopRequested

_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Whether the run has been asked to stop, and how."""

    def __init__(self) -> None:
        self._number = 0

    @property
    def number(self) -> int:
        """The signal that asked, or 0."""
        return self._number

    def install(self) -> None:
        """Take SIGTERM (preemption) and SIGINT (Ctrl-C). Main thread only."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        # Ray's threads block SIGINT, and a process inherits that from the one that starts it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._number = number


def stop_error(number: int, step: int) -> StopRequested:
    """The error that ends a run which a signal has asked to stop after `step` updates."""
    if number == signal.SIGTERM:
        return StopRequested(
            f"preempted by SIGTERM after step {step}", exit_code=ExitCode.PREEMPTED
        )
    return StopRequested(f"interrupted after step {step}", exit_code=ExitCode.INTERRUPTED)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, however that ends.

    A compile is one long C call during which no Python runs, so nothing in this process
    could notice the parent's end by itself. Linux only; elsewhere it does nothing.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
