"""What a run looks like to the person who started it.

Progress goes to stderr, drawn on a terminal and in plain lines elsewhere; only the final
table goes to stdout. Nothing here can end a run: see `SafeStream`.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import IO, TextIO, cast

from rich.console import Console as RichConsole

from runner.observe.live import LiveDisplay
from runner.observe.metrics import Point
from runner.observe.plain import PlainDisplay
from runner.observe.streams import SafeStream
from runner.observe.summary import print_summary
from runner.record.events import Event, Notice
from runner.record.outcome import Result


class Console:
    """Shows events, the worker's log and, at the end, a table.

    Args:
        stderr: For progress; default `sys.stderr`.
        stdout: For the table; default `sys.stdout`.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        stderr: TextIO | None = None,
        stdout: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._errors = errors = SafeStream(stderr or sys.stderr)
        self._out = _rich(SafeStream(stdout or sys.stdout))
        drawable = errors.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._display: LiveDisplay | PlainDisplay = (
            LiveDisplay(_rich(errors), clock=clock)
            if drawable
            else PlainDisplay(errors, clock=clock)
        )

    def handle(self, event: Event, point: Point | None = None) -> None:
        """Show an event; `point` is what `Tally.take` made of it."""
        if isinstance(event, Notice):
            self.notice(event.message, warning=event.level == "warning")
        else:
            self._display.handle(event, point)

    def echo(self, line: str) -> None:
        """Show a line of the worker's log, as text and nothing but text."""
        self._display.echo(line)

    def notice(self, message: str, *, warning: bool = False) -> None:
        """Show something that the user should read."""
        self._display.say(message, warning=warning)

    def close(self) -> None:
        """End the progress display; `summary` may follow."""
        self._display.close()

    def summary(self, result: Result, logdir: pathlib.Path) -> None:
        """Print the final table and the TensorBoard command; the reason of a failure last."""
        print_summary(self._out, result=result, logdir=logdir)
        if result.reason:
            self._errors.write(f"runner: {result.reason}\n")
            self._errors.flush()


def _rich(stream: SafeStream) -> RichConsole:
    return RichConsole(
        file=cast(IO[str], stream),
        force_terminal=stream.isatty(),
        markup=False,
        emoji=False,
        highlight=False,
    )
