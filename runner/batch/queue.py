"""Which job is next: in order, but jobs of one graph after another on one slot."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Protocol

from runner.batch.job import BatchJob
from runner.batch.ledger import Entry
from runner.observe.metrics import Point
from runner.record.errors import ExitCode
from runner.record.outcome import State

#: Ends that would come again, or that somebody wanted.
_FINAL = (ExitCode.CONFIG, ExitCode.DATA, ExitCode.BUSY, ExitCode.NON_FINITE, ExitCode.INTERRUPTED)


class JobSource(Protocol):
    """Hands out jobs. Every call is made under the batch's lock."""

    def take(self, key: str | None) -> BatchJob | None:
        """The next job for a slot whose process knows the graph `key`; None if there is none."""

    def peek(self, key: str | None) -> BatchJob | None:
        """What `take` would hand out now, as far as that is known."""

    def watch(self, job: BatchJob, point: Point) -> str:
        """Look at new figures of a job that runs; a reason to stop it, or ""."""

    def ended(self, job: BatchJob, entry: Entry) -> None:
        """Take note of how a job ended; `take` may hand it out again."""


class JobQueue:
    """The jobs of a grid.

    Args:
        jobs: In the order of their numbers.
        retries: How often a job that failed is put at the end again.
    """

    def __init__(self, jobs: Iterable[BatchJob], *, retries: int) -> None:
        self._waiting = [job for job in jobs if not job.done]
        self._retries = Retries(retries)

    def take(self, key: str | None) -> BatchJob | None:
        """The first job with the graph `key`, or else the first."""
        if not self._waiting:
            return None
        return self._waiting.pop(first_with(key, self._waiting))

    def peek(self, key: str | None) -> BatchJob | None:
        """The first job with the graph `key`, or else the first; it stays."""
        return self._waiting[first_with(key, self._waiting)] if self._waiting else None

    def watch(self, job: BatchJob, point: Point) -> str:
        """A grid stops nothing."""
        return ""

    def ended(self, job: BatchJob, entry: Entry) -> None:
        """Put a job that failed at the end, while its retries last."""
        if self._retries.again(job.number, entry):
            self._waiting.append(job)


class Retries:
    """Decides whether a job that failed is tried once more.

    Args:
        most: How often a job may be.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._used: collections.Counter[int] = collections.Counter()

    def again(self, number: int, entry: Entry) -> bool:
        """Whether job `number`, which ended so, is tried again; counts it."""
        failed = entry.state in (State.FAILED, State.TIMED_OUT)
        if not failed or entry.exit_code in _FINAL or self._used[number] >= self._most:
            return False
        self._used[number] += 1
        return True


def first_with(key: str | None, waiting: Sequence[BatchJob]) -> int:
    """Where the first job with the graph `key` stands, or else the first."""
    return next((at for at, job in enumerate(waiting) if job.key == key), 0)
