"""Step times: from the end of one step to the end of the next, pauses left out.

A thread waits for each step in turn, so that its end is seen when it happens, while the loop
already hands the next step over. It also passes finished steps on, so that logging is off
the loop's path.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType

from runner.backends.base import Backend, Metrics
from runner.record.events import StepRecord

#: Seconds between two readings of the runtime's program counter, which costs 50 us when full.
_PROGRAMS_EVERY_S = 0.2
#: Readings at the start, one a step.
_FIRST_READINGS = 4
#: Steps that wait to be waited for: with the one that runs, how far the host runs ahead.
_AHEAD = 1


@dataclasses.dataclass(frozen=True)
class FinishedStep:
    """A step whose end was seen.

    Attributes:
        record: Its times.
        metrics: The metrics of its call.
        index: Which of the call's updates it is.
    """

    record: StepRecord
    metrics: CallMetrics
    index: int

    def value(self, name: str) -> float:
        """A metric of this step."""
        return self.metrics.values(name)[self.index]


class CallMetrics:
    """The metrics of one call, each brought to the host when it is first asked for."""

    def __init__(self, on_device: Metrics) -> None:
        self.names = list(on_device)
        self._on_device = on_device
        self._on_host: dict[str, list[float]] = {}

    def values(self, name: str) -> list[float]:
        """A metric of each update of the call.

        sync: waits until the program that makes it has ended.
        """
        if name not in self._on_host:
            self._on_host[name] = self._on_device[name].cpu().reshape(-1).tolist()
        return self._on_host[name]


@dataclasses.dataclass(frozen=True)
class _Launch:
    step: int
    metrics: CallMetrics
    host_s: float
    wait_s: float
    programs: float
    profiled: bool


class StepClock:
    """Follows steps that were handed to the device until they end.

    Args:
        backend: Asked for its counts of compiles and programs.
        on_end: Called with each finished step, in order, in the clock's thread.
        now: Monotonic seconds.

    Attributes:
        profiling: Whether the steps that are launched are traced.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        on_end: Callable[[FinishedStep], None],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.now = now
        self.profiling = False
        self._backend = backend
        self._on_end = on_end
        self._launches: queue.Queue[_Launch | None] = queue.Queue(maxsize=_AHEAD)
        self._error: BaseException | None = None
        self._programs = _ProgramRate(backend, now)
        self._launched = 0
        self.resume()
        self._thread = threading.Thread(target=self._watch, name="step-clock", daemon=True)
        self._thread.start()

    def __enter__(self) -> StepClock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._launches.put(None)
        self._thread.join()

    def resume(self) -> None:
        """Start counting after a pause (start, evaluation, checkpoint); drain before one."""
        self._last_end = self.now()
        self._compiles = self._backend.compile_totals()[0]
        self._programs.skip()

    def launched(self, step: int, metrics: Metrics, *, host_s: float, wait_s: float) -> None:
        """Note a call that the device was handed: one update, or several that end together.

        sync: waits while more than one earlier call has not ended.

        Args:
            step: Completed updates, those of this call included.
            metrics: What `Backend.train_steps` returned.
            host_s: Seconds that the call took to dispatch.
            wait_s: Seconds that the loop waited for its batches.

        Raises:
            BaseException: What `on_end` raised for an earlier step.
        """
        self._raise_error()
        self._launched = step
        programs = self._programs.per_step(step)
        launch = _Launch(step, CallMetrics(metrics), host_s, wait_s, programs, self.profiling)
        self._launches.put(launch)

    def drain(self) -> None:
        """Wait until every step has ended.

        sync: for a pause or the end of the run.

        Raises:
            BaseException: What `on_end` raised for one of them.
        """
        self._launches.join()
        self._programs.read(self._launched)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _watch(self) -> None:
        while True:
            launch = self._launches.get()
            try:
                if launch is None:
                    return
                if self._error is None:
                    self._end(launch)
            except BaseException as error:
                self._error = error
            finally:
                self._launches.task_done()

    def _end(self, launch: _Launch) -> None:
        count = len(launch.metrics.values("loss"))
        end = self.now()
        compiles = self._backend.compile_totals()[0]
        compiled = compiles != self._compiles
        shared_ms = 1e3 / count
        time_ms = (end - self._last_end) * shared_ms
        self._last_end, self._compiles = end, compiles
        for k in range(count):
            if compiled:  # No step is done before all are: the time is the first one's.
                time_ms = time_ms * count if k == 0 else 0.0
            record = StepRecord(
                step=launch.step - count + k + 1,
                time_ms=time_ms,
                host_ms=launch.host_s * shared_ms,
                data_wait_ms=launch.wait_s * shared_ms,
                programs=launch.programs,
                compiled=compiled,
                profiled=launch.profiled,
            )
            self._on_end(FinishedStep(record, launch.metrics, k))
        self._backend.ended(launch.step)


class _ProgramRate:
    """Device programs a step, read now and then."""

    def __init__(self, backend: Backend, now: Callable[[], float]) -> None:
        self._backend = backend
        self._now = now
        self._readings = 0
        self._read_at = 0.0
        self._step: int | None = None
        self._count = 0
        self._rate = 0.0

    def per_step(self, step: int) -> float:
        if self._readings < _FIRST_READINGS or self._now() - self._read_at >= _PROGRAMS_EVERY_S:
            self.read(step)
        return self._rate

    def read(self, step: int) -> None:
        """Bring the rate up to date with `step`, the newest step that was handed over."""
        count = self._backend.programs()
        steps = 1 if self._step is None else step - self._step
        if steps > 0:
            self._rate = (count - self._count) / steps
        self._readings += 1
        self._read_at, self._step, self._count = self._now(), step, count

    def skip(self) -> None:
        """Leave out the programs that were handed over since the last reading."""
        self._count = self._backend.programs()
