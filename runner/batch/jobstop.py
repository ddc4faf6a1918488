"""What stops one job of a batch: the batch's end, its own time limit, or a reason of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from runner.batch.stop import StopSignals
from runner.record.errors import ExitCode, Fault
from runner.record.outcome import Attempt


class JobStop:
    """Whether a job of a batch has been asked to stop. Safe to use from several threads.

    Args:
        signals: Those that the batch got.
        limit_s: Seconds that the job may take in all, or None.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        signals: StopSignals,
        *,
        limit_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._signals = signals
        self._limit_s = limit_s
        self._clock = clock
        self._began = clock()
        self._reason: tuple[ExitCode, str] | None = None

    @property
    def interrupts(self) -> int:
        """How often Ctrl-C was pressed."""
        return self._signals.interrupts

    @property
    def terminated(self) -> bool:
        """Whether it was asked to save and end."""
        return self._signals.terminated or self.reason is not None

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for in any way."""
        return self.terminated or self.interrupts > 0

    @property
    def reason(self) -> tuple[ExitCode, str] | None:
        """Exit code and cause of a stop that is meant for this job."""
        late = self._limit_s is not None and self._clock() - self._began > self._limit_s
        if late and self._reason is None:
            cause = f"it took longer than {self._limit_s:g} s (batch.time_limit_s)"
            self._reason = (ExitCode.HANG, cause)
        return self._reason

    def stop(self, code: ExitCode, cause: str) -> None:
        """Ask this job to save and end; the first reason counts."""
        if self._reason is None:
            self._reason = (code, cause)

    def excuse(self, seconds: float) -> None:
        """Time that was spent waiting for a machine does not count."""
        self._began += seconds

    def verdict(self, attempt: Attempt) -> Attempt:
        """An attempt that ended because it was asked to: with the reason for asking."""
        if self._reason is None or attempt.exit_code != ExitCode.PREEMPTED:
            return attempt
        code, cause = self._reason
        if code is not ExitCode.PRUNED:
            cause = f"{cause}; {attempt.cause}"
        return dataclasses.replace(attempt, exit_code=int(code), cause=cause, fault=Fault.FINAL)
