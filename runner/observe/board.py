"""The table of a batch while it runs: drawn on a terminal, in plain lines elsewhere.

Jobs report from several threads; nothing here can end one. The table at the end is
`runner.batch.summary`'s.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, TextIO, cast

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runner.observe.live import open_live
from runner.observe.metrics import Point
from runner.observe.progress import Progress, duration
from runner.observe.streams import SafeStream
from runner.record.events import Event, Notice
from runner.record.outcome import Result, State

_DRAWINGS_PER_S = 2
#: Plain lines: seconds between two lines on how the batch goes.
_EVERY_S = 15.0
#: Columns, and how those of any length share what the others leave.
_COLUMNS = (
    ("job", None),
    ("overrides", 3),
    ("state", None),
    ("step", 2),
    ("loss", None),
    ("rate", None),
    ("left", None),
)
#: Lines of the terminal that the table leaves free, for headings and the last line.
_SPARE_LINES = 6


@dataclasses.dataclass
class Row:
    """A job on the board."""

    number: int
    overrides: tuple[str, ...]
    progress: Progress
    state: State = State.PENDING
    began_s: float = 0.0
    said: str = ""

    @property
    def label(self) -> str:
        """What was asked for."""
        return " ".join(self.overrides)


class Board:
    """Shows the jobs of a batch.

    Args:
        stream: Where to; default `sys.stderr`.
        clock: Monotonic seconds.
    """

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = SafeStream(stream or sys.stderr)
        self._clock = clock
        self._rows: dict[int, Row] = {}
        self._lock = threading.RLock()
        self._last_line_s = clock()
        self._console = Console(
            file=cast(IO[str], self._stream),
            force_terminal=True,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self._live: Live | None = None
        if self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            self._live = open_live(self._console, self._draw, per_second=_DRAWINGS_PER_S)

    def add(self, number: int, overrides: tuple[str, ...], state: State) -> None:
        """Put a job on the board."""
        with self._lock:
            self._rows[number] = Row(number, overrides, Progress(self._clock), state)

    def start(self, number: int, where: str) -> JobDisplay:
        """A job starts on a slot; returns what shows it."""
        with self._lock:
            row = self._rows[number]
            row.state, row.began_s = State.RUNNING, self._clock()
            row.progress, row.said = Progress(self._clock), ""
            self._line(f"job {number} started on {where}: {row.label}")
        return JobDisplay(self, number)

    def end(self, number: int, state: State, said: str) -> None:
        """A job has ended; `said` is its result or its reason."""
        with self._lock:
            row = self._rows[number]
            row.state, row.said = state, said
            took = duration(self._clock() - row.began_s)
            self._line(f"job {number} {state.value} after {took}: {said}")

    def say(self, message: str) -> None:
        """Show something that the user should read."""
        with self._lock:
            if self._live is not None:
                self._console.print(Text(message), soft_wrap=True)
            else:
                self._write(message)

    def take(self, number: int, event: Event, point: Point | None) -> None:
        """Count in an event of a job."""
        with self._lock:
            self._rows[number].progress.take(event, point)
            if isinstance(event, Notice) and event.level == "warning":
                self.say(f"job {number}: {event.message}")
            if self._live is None and self._clock() - self._last_line_s >= _EVERY_S:
                self._write(self.counts())

    def counts(self) -> str:
        """How the batch stands, in one line."""
        with self._lock:
            states = collections.Counter(row.state for row in self._rows.values())
            parts = [f"{states[state]} {state.value}" for state in State if states[state]]
            running = [
                f"job {row.number} {_step(row.progress)}"
                for row in self._rows.values()
                if row.state is State.RUNNING
            ]
        return f"{len(self._rows)} jobs: {', '.join(parts + running)}"

    def close(self) -> None:
        """Take the drawing away."""
        if self._live is not None:
            self._live.stop()

    def _line(self, message: str) -> None:
        if self._live is None:
            self._write(message)

    def _write(self, message: str) -> None:
        self._last_line_s = self._clock()
        self._stream.write(f"{message}\n")
        self._stream.flush()

    def _draw(self) -> RenderableType:
        table = Table(box=box.SIMPLE, pad_edge=False, expand=True)
        for heading, ratio in _COLUMNS:
            table.add_column(heading, overflow="ellipsis", no_wrap=True, ratio=ratio)
        with self._lock:
            common = _common(list(self._rows.values()))
            for row in self._worth_a_line():
                table.add_row(*_cells(row, common))
            counts = self.counts()
        return Group(table, Text(counts, no_wrap=True, overflow="ellipsis"))

    def _worth_a_line(self) -> list[Row]:
        """As many jobs as fit: those that run, that went wrong, that are next, that are done."""
        room = max(1, self._console.height - _SPARE_LINES)
        rows = self._rows.values()
        by_interest = [
            *(row for row in rows if row.state is State.RUNNING),
            *(row for row in rows if row.state.ended and not row.state.good),
            *(row for row in rows if row.state is State.PENDING),
            *(row for row in reversed(list(rows)) if row.state.good),
        ]
        return sorted(by_interest[:room], key=lambda row: row.number)


class JobDisplay:
    """One job's part of a board: a `Display` for the job's observer."""

    def __init__(self, board: Board, number: int) -> None:
        self._board = board
        self._number = number

    def handle(self, event: Event, point: Point | None = None) -> None:
        """Show an event."""
        self._board.take(self._number, event, point)

    def echo(self, line: str) -> None:
        """A job's log stays in its run folder: lines of several jobs would be mixed."""

    def notice(self, message: str, *, warning: bool = False) -> None:
        """Show something that the user should read."""
        self._board.say(f"job {self._number}: {message}")

    def close(self) -> None:
        """The row stays."""

    def summary(self, result: Result, logdir: pathlib.Path) -> None:
        """The batch's own table says it."""


def _common(rows: Sequence[Row]) -> set[str]:
    """Overrides that tell no job from another."""
    return set.intersection(*(set(row.overrides) for row in rows)) if len(rows) > 1 else set()


def _cells(row: Row, common: set[str]) -> tuple[str | Text, ...]:
    state = Text(row.state.value, style=row.state.colour)
    label = Text(" ".join(each for each in row.overrides if each not in common))
    if row.state is not State.RUNNING:
        return str(row.number), label, state, Text(row.said), "", "", ""
    progress = row.progress
    loss = "" if progress.loss is None else f"{progress.loss:.4f}"
    rate = "" if progress.examples_per_s is None else f"{progress.examples_per_s:,.0f}/s"
    left = "" if progress.left_s is None else duration(progress.left_s)
    return str(row.number), label, state, _step(progress), loss, rate, left


def _step(progress: Progress) -> str:
    if not progress.training:
        return progress.phase
    return f"step {progress.step}/{progress.steps or '?'}"
