"""Step times: from the end of one step to the end of the next, pauses left out."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable

from torch import Tensor

from runner.backends.base import Backend, Metrics
from runner.record.events import StepRecord

#: Seconds between two readings of the runtime's program counter, which costs 50 us when full.
_PROGRAMS_EVERY_S = 0.2


@dataclasses.dataclass(frozen=True)
class FinishedStep:
    """A step whose end was seen, its metrics still on the device but for the loss."""

    record: StepRecord
    loss: float
    metrics: Metrics


class StepClock:
    """Follows steps that were handed to the device until they end.

    Up to `depth` steps are in flight: the host waits for a step only after it has handed
    over `depth` more, so that the device always has its next program.

    Args:
        backend: Asked for its counts of compiles and programs.
        depth: Steps in flight.
        now: Monotonic seconds.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        depth: int = 1,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.now = now
        self._backend = backend
        self._depth = depth
        self._flight: collections.deque[tuple[int, Metrics, float, float]] = collections.deque()
        self._last_end = now()
        self._compiles = backend.compile_totals()[0]
        self._programs = backend.programs()
        self._programs_read = (self._last_end, 0)
        self._programs_per_step = 0.0

    def resume(self) -> None:
        """Start counting again after a pause (start, evaluation, checkpoint)."""
        assert not self._flight, "drain before a pause"
        self._last_end = self.now()
        self._compiles = self._backend.compile_totals()[0]

    def launched(self, step: int, metrics: Metrics, *, host_s: float, wait_s: float) -> None:
        """Note a step that the device was handed; `step` counts it as completed."""
        self._flight.append((step, metrics, host_s, wait_s))

    def finished(self, *, drain: bool = False) -> list[FinishedStep]:
        """The steps that have ended, oldest first; all of them when draining."""
        keep = 0 if drain else self._depth
        ended = []
        while len(self._flight) > keep:
            ended.append(self._end(*self._flight.popleft()))
        return ended

    def _end(self, step: int, metrics: Metrics, host_s: float, wait_s: float) -> FinishedStep:
        loss = fetch(metrics["loss"])
        end = self.now()
        compiles = self._backend.compile_totals()[0]
        record = StepRecord(
            step=step,
            time_ms=(end - self._last_end) * 1e3,
            host_ms=host_s * 1e3,
            data_wait_ms=wait_s * 1e3,
            programs=self._count_programs(step, end),
            compiled=compiles != self._compiles,
        )
        self._last_end, self._compiles = end, compiles
        return FinishedStep(record, loss, metrics)

    def _count_programs(self, step: int, now: float) -> float:
        then, at_step = self._programs_read
        launched = step + len(self._flight)
        if launched > at_step and (now - then >= _PROGRAMS_EVERY_S or not self._programs_per_step):
            programs = self._backend.programs()
            self._programs_per_step = (programs - self._programs) / (launched - at_step)
            self._programs = programs
            self._programs_read = (now, launched)
        return self._programs_per_step


def fetch(scalar: Tensor) -> float:
    """The value of a scalar on the device.

    sync: waits until the program that makes it has ended.
    """
    return float(scalar.item())
