"""Notices that a worker has stopped going forward, by the events that it no longer sends."""

from __future__ import annotations

import time
from collections.abc import Callable

from runner.config.schema import TimeoutsConfig
from runner.record.events import Compiled, Event, Phase, Started

#: Phases before the first step.
_START = ("starting", "waiting", "building", "restoring")
_COMPILING = "compiling"


class Watchdog:
    """Compares the time since a worker's last event with what its phase may take.

    Args:
        config: The limits.
        clock: Monotonic seconds.
    """

    def __init__(
        self, config: TimeoutsConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._clock = clock
        self._last_s = clock()
        self._phase = self._outer = "starting"

    def see(self, event: Event) -> None:
        """Take note of a sign of life."""
        self._last_s = self._clock()
        if isinstance(event, Phase):
            self._phase = event.name
            if event.name != _COMPILING:
                self._outer = event.name
        elif isinstance(event, Compiled):
            self._phase = self._outer
        elif isinstance(event, Started):
            self._phase = self._outer = "building"

    @property
    def phase(self) -> str:
        """What the worker is doing."""
        return self._phase

    def overdue(self) -> str | None:
        """Why the worker counts as hung, or None while it does not."""
        key, limit_s = self._limit()
        if self._clock() - self._last_s <= limit_s:
            return None
        return f"no sign of life for {limit_s:g} s while {self._phase} (timeouts.{key})"

    def _limit(self) -> tuple[str, float]:
        if self._phase == _COMPILING:
            return "compile_s", self._config.compile_s
        if self._phase in _START:
            return "start_s", self._config.start_s
        return "step_s", self._config.step_s
