"""How much of the machine others used while the contestants were timed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import psutil


class Bystanders:
    """The machine's CPU time since this was made, less the contestants' own.

    Args:
        pids: The contestants' processes.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._start = self._now()

    def share(self) -> float:
        """What others used, as a fraction of all that there was."""
        total, others = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, others / total) if total else 0.0

    def _now(self) -> tuple[float, float]:
        """CPU seconds of all cores together, and those that were used by others."""
        machine = psutil.cpu_times()
        waiting = machine.idle + getattr(machine, "iowait", 0.0)
        # A guest's time is in its host's user time already.
        guests = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)
        total = sum(machine) - guests
        return total, total - waiting - self._own()

    def _own(self) -> float:
        seconds = 0.0
        for pid in self._pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(pid).cpu_times()
                seconds += times.user + times.system
        return seconds
