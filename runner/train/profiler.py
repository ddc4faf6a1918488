"""Traces the updates that `profile.steps` names."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from runner.record.events import Event, Profiled

if TYPE_CHECKING:
    from runner.xla.profile import Trace


class Profiler:
    """Starts and stops a trace between two calls; leaving it ends one that still runs.

    Args:
        steps: The first and the last update to trace, or None for no trace.
        folder: The run's TensorBoard folder.
        send: Where the event of a finished trace goes.
    """

    def __init__(
        self, steps: list[int] | None, *, folder: pathlib.Path, send: Callable[[Event], None]
    ) -> None:
        self._first, self._last = steps or (0, 0)
        self._folder = folder
        self._send = send
        self._trace: Trace | None = None
        self._began_s = 0.0
        self._calls = 0
        self._traced = (0, 0)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def running(self) -> bool:
        """Whether a trace runs."""
        return self._trace is not None

    def due(self, step: int, count: int) -> bool:
        """Whether to start or to stop before the call of `count` updates after `step`.

        The first call of a process compiles and is never traced.
        """
        if self.running:
            return step >= self._last
        return self._calls > 0 and step < self._last and step + count >= self._first

    def turn(self, step: int) -> None:
        """Start or stop; all that was handed to the device must have ended."""
        if self.running:
            self._stop()
            return
        from runner.xla.profile import Trace  # Only here: backend=eager needs no XLA.

        self._began_s = time.perf_counter()
        self._traced = (step + 1, step)
        self._trace = Trace(self._folder)

    def call(self, step: int, count: int) -> contextlib.AbstractContextManager[None]:
        """Around the call of `count` updates after `step`: marks it in a trace that runs."""
        self._calls += 1
        if self._trace is None:
            return contextlib.nullcontext()
        self._traced = (self._traced[0], step + count)
        return self._trace.step(step + 1)

    def _stop(self) -> None:
        if self._trace is None:
            return
        self._trace.stop()
        self._trace = None
        seconds = time.perf_counter() - self._began_s
        first, last = self._traced
        self._send(Profiled(first, last, str(self._folder), seconds))
