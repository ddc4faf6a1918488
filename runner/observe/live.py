"""Progress drawn in place on a terminal; messages and the worker's log scroll above it."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from runner.observe.metrics import Point
from runner.observe.progress import Progress, message_of
from runner.record.events import Compiled, Event

_DRAWINGS_PER_S = 4
_BAR_CELLS = 40
#: On a narrower terminal a bar would leave no room for the figures.
_CELLS_FOR_BAR = 50


class LiveDisplay:
    """Draws a phase with a running clock or a bar with figures.

    Args:
        console: The terminal.
        clock: Monotonic seconds.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._progress = Progress(clock)
        self._live = open_live(console, self._draw, per_second=_DRAWINGS_PER_S)

    def handle(self, event: Event, point: Point | None) -> None:
        """Show what an event changed."""
        self._progress.take(event, point)
        message = message_of(event)
        if message is not None:
            self.say(message, warning=isinstance(event, Compiled) and event.graph.recompile)

    def echo(self, line: str) -> None:
        """Pass on a line of the worker's log; its colours stay, its cursor movements go."""
        self._console.print(Text.from_ansi(line), soft_wrap=True)

    def say(self, message: str, *, warning: bool = False) -> None:
        """Write one line above the drawing."""
        self._console.print(Text(message, style="yellow" if warning else ""), soft_wrap=True)

    def close(self) -> None:
        """Take the drawing away."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        progress = self._progress
        figures = _line("  ".join(progress.figures()))
        if not progress.training:
            return Group(_line(progress.phase_line()), figures)
        count = f"step {progress.step}/{progress.steps or '?'}"
        if self._console.width < _CELLS_FOR_BAR or not progress.steps:
            return Group(_line(count), figures)
        row = Table.grid(padding=(0, 1))
        bar_cells = min(_BAR_CELLS, self._console.width - len(count) - 2)
        row.add_row(
            ProgressBar(total=progress.steps, completed=progress.step, width=bar_cells),
            _line(count),
        )
        return Group(row, figures)


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="crop")


def open_live(console: Console, draw: Callable[[], RenderableType], *, per_second: int) -> Live:
    """A display below the terminal's lines, drawn so often, that leaves nothing behind."""
    live = Live(
        console=console,
        get_renderable=draw,
        refresh_per_second=per_second,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        vertical_overflow="crop",
    )
    live.start()
    return live
