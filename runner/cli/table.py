"""The table at the end of a batch."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.cli.runs import Row
from runner.observe.summary import tensorboard_command
from runner.record.outcome import State

_NO_TERMINAL_WIDTH = 160


def show_batch(rows: Sequence[Row], *, folder: pathlib.Path) -> None:
    """Print one line a job, and how to look at all of them."""
    table = Table(box=box.SIMPLE)
    for heading in ("job", "overrides", "state", "result"):
        table.add_column(heading, overflow="fold")
    table.add_column("seconds", justify="right")
    for row in rows:
        state = Text(row.state.value, style="green" if row.state is State.SUCCEEDED else "red")
        table.add_row(
            str(row.number),
            Text(" ".join(row.overrides)),
            state,
            Text(_result(row)),
            f"{row.seconds:.1f}",
        )
    width = None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH
    console = Console(width=width)
    console.print(table)
    succeeded = sum(row.state is State.SUCCEEDED for row in rows)
    print(f"{succeeded} of {len(rows)} jobs succeeded")
    print(tensorboard_command(folder), flush=True)


def _result(row: Row) -> str:
    if row.state is State.SUCCEEDED:
        return " ".join(f"{name}={value:.4g}" for name, value in row.final.items())
    return row.reason
