"""What a host shows that is not the first of its job: the first shows the run."""

from __future__ import annotations

import pathlib
import sys
from typing import TextIO

from runner.observe.metrics import Point
from runner.observe.streams import SafeStream
from runner.record.events import Event, Notice
from runner.record.outcome import Result


class FollowerDisplay:
    """Says what goes wrong on this host, and how it ended, with the host's number.

    Args:
        index: The host's number.
        count: How many hosts there are.
        stderr: Where lines go; default `sys.stderr`.
    """

    def __init__(self, index: int, count: int, *, stderr: TextIO | None = None) -> None:
        self._stream = SafeStream(stderr or sys.stderr)
        self._name = f"host {index} of {count}"

    def handle(self, event: Event, point: Point | None = None) -> None:
        """Pass on a warning; all else is told by the first host."""
        if isinstance(event, Notice) and event.level == "warning":
            self.notice(event.message, warning=True)

    def echo(self, line: str) -> None:
        """Pass on a line of the worker's log, which is kept nowhere else."""
        self.notice(line)

    def notice(self, message: str, *, warning: bool = False) -> None:
        """Write one line."""
        kind = "warning: " if warning else ""
        self._stream.write(f"{self._name}: {kind}{message}\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is left on the screen."""

    def summary(self, result: Result, logdir: pathlib.Path) -> None:
        """Say how it ended, and where the run is."""
        reason = f": {result.reason}" if result.reason else ""
        self.notice(f"{result.state.value} after {result.steps} steps{reason} (host 0 has the run)")
