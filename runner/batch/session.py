"""A batch from its first job to its last: a thread a slot, each seeing one job through.

The threads share the source of jobs, the ledger and the board. What happens to a job is an
entry in the ledger and nothing else: no job ends the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from runner.batch.job import BatchJob
from runner.batch.jobstop import JobStop
from runner.batch.ledger import Entry, Ledger
from runner.batch.queue import JobSource
from runner.batch.stop import StopSignals
from runner.batch.table import said
from runner.config.schema import BatchConfig
from runner.observe.board import Board, JobDisplay
from runner.observe.display import Display
from runner.observe.metrics import Point
from runner.record.errors import ExitCode, RunnerError
from runner.record.events import Event
from runner.record.outcome import Result, State, state_of

#: Seconds between two looks at the signals that the batch got.
_POLL_S = 0.1


class Station(Protocol):
    """A place where one job at a time is seen through: a slot of this machine, say."""

    @property
    def name(self) -> str:
        """What it is, for people."""

    @property
    def key(self) -> str | None:
        """The graph that a job finds compiled here, if there is one."""

    def run(
        self, job: BatchJob, *, display: Display, stop: JobStop, following: BatchJob | None
    ) -> Result:
        """See a job through.

        Args:
            job: What to do.
            display: Shows it.
            stop: Stops it.
            following: What will probably be done here next, if that is known.

        Raises:
            RunnerError: It cannot be started.
        """

    def close(self) -> None:
        """No job will follow."""


class Session:
    """Runs the jobs of a source.

    Args:
        source: Hands out jobs.
        stations: Where they run.
        ledger: Takes what becomes of them.
        settings: The `batch` section.
        board: Shows them.
    """

    def __init__(
        self,
        source: JobSource,
        stations: Sequence[Station],
        *,
        ledger: Ledger,
        settings: BatchConfig,
        board: Board,
    ) -> None:
        self._source = source
        self._stations = stations
        self._ledger = ledger
        self._settings = settings
        self._board = board
        self._lock = threading.Lock()
        self._running: dict[int, JobStop] = {}
        self._signals = StopSignals()
        self._closed = False
        self._broken: Exception | None = None

    def run(self) -> ExitCode:
        """Run until the source has no more jobs, or until asked to stop.

        Returns:
            DONE, or what stopped the batch: INTERRUPTED or PREEMPTED.

        Raises:
            Exception: The source of jobs or the ledger failed; the other jobs were stopped.
        """
        threads = [
            threading.Thread(target=self._serve, args=(station,), name=f"slot-{number}")
            for number, station in enumerate(self._stations)
        ]
        with self._signals:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_POLL_S)  # short, so that a signal is seen at once
        if self._broken is not None:
            raise self._broken
        if self._signals.interrupts:
            return ExitCode.INTERRUPTED
        return ExitCode.PREEMPTED if self._signals.terminated else ExitCode.DONE

    def _serve(self, station: Station) -> None:
        """One slot's thread: job after job."""
        try:
            while (job := self._next(station)) is not None:
                self._see_through(job, station)
        except Exception as error:  # raised again by `run`, in the main thread
            with self._lock:
                self._broken = self._broken or error
                self._stop_all(f"the batch failed: {error}")
        finally:
            station.close()

    def _next(self, station: Station) -> BatchJob | None:
        with self._lock:
            if self._closed or self._signals.asked:
                return None
            return self._source.take(station.key)

    def _see_through(self, job: BatchJob, station: Station) -> None:
        stop = JobStop(self._signals, limit_s=self._settings.time_limit_s)
        with self._lock:
            earlier = self._ledger.entries.get(job.number, job.entry)
            begun = dataclasses.replace(earlier, state=State.RUNNING, tries=earlier.tries + 1)
            self._ledger.put(begun)
            self._running[job.number] = stop
            following = self._source.peek(job.key)
        shown = self._board.start(job.number, station.name)
        display = _Watched(shown, lambda point: self._watch(job, stop, point))
        start = time.monotonic()
        run = functools.partial(station.run, display=display, stop=stop, following=following)
        result = _guarded(run, job)
        entry = _ended(begun, result, seconds=time.monotonic() - start)
        with self._lock:
            del self._running[job.number]
            self._ledger.put(entry)
            self._source.ended(job, entry)
            self._board.end(job.number, entry.state, said(entry.state, entry.final, entry.reason))
            if self._settings.fail_fast and entry.state in (State.FAILED, State.TIMED_OUT):
                self._stop_all(f"job {job.number} failed (batch.fail_fast)")

    def _watch(self, job: BatchJob, stop: JobStop, point: Point) -> None:
        with self._lock:
            reason = self._source.watch(job, point)
        if reason:
            stop.stop(ExitCode.PRUNED, reason)

    def _stop_all(self, cause: str) -> None:
        self._closed = True
        for stop in self._running.values():
            stop.stop(ExitCode.INTERRUPTED, cause)


class _Watched:
    """A display whose figures are also looked at."""

    def __init__(self, shown: JobDisplay, watch: Callable[[Point], None]) -> None:
        self._watch = watch
        self.echo, self.notice = shown.echo, shown.notice
        self.close, self.summary = shown.close, shown.summary
        self._handle = shown.handle

    def handle(self, event: Event, point: Point | None = None) -> None:
        self._handle(event, point)
        if point is not None:
            self._watch(point)


def _guarded(run: Callable[[BatchJob], Result], job: BatchJob) -> Result:
    """The result of a job, whatever happens."""
    try:
        return run(job)
    except RunnerError as error:
        return _failed(job, error.exit_code, str(error))
    except Exception as error:  # a bug of ours must not end the batch
        traceback.print_exc()
        return _failed(job, ExitCode.BUG, f"{type(error).__name__}: {error}")


def _failed(job: BatchJob, code: ExitCode, reason: str) -> Result:
    return Result(
        job=job.config.job.name,
        backend=job.config.backend.name,
        state=state_of(code),
        exit_code=int(code),
        reason=reason,
    )


def _ended(begun: Entry, result: Result, *, seconds: float) -> Entry:
    return dataclasses.replace(
        begun,
        state=result.state,
        exit_code=result.exit_code,
        reason=result.reason,
        seconds=round(begun.seconds + seconds, 3),
        steps=result.steps,
        final=result.final,
    )
