"""What an observer shows a run on: a console of its own, or a row of a batch's table."""

from __future__ import annotations

import pathlib
from typing import Protocol

from runner.observe.metrics import Point
from runner.record.events import Event
from runner.record.outcome import Result


class Display(Protocol):
    """Takes what is worth showing of one run. Nothing here may end the run."""

    def handle(self, event: Event, point: Point | None = None) -> None:
        """Show an event; `point` is what `Tally.take` made of it."""

    def echo(self, line: str) -> None:
        """Show a line of the worker's log."""

    def notice(self, message: str, *, warning: bool = False) -> None:
        """Show something that the user should read."""

    def close(self) -> None:
        """End the progress display; `summary` may follow."""

    def summary(self, result: Result, logdir: pathlib.Path) -> None:
        """Show how the run ended."""
