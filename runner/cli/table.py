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
from runner.observe.preflight import size
from runner.observe.summary import tensorboard_command
from runner.record.outcome import State
from runner.record.preflight import PreflightReport

_NO_TERMINAL_WIDTH = 160


def show_batch(rows: Sequence[Row], *, folder: pathlib.Path) -> None:
    """Print one line a job, and how to look at all of them."""
    width = None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH
    console = Console(width=width)
    judged = any(row.preflight is not None for row in rows)
    console.print(_verdicts(rows) if judged else _outcomes(rows))
    succeeded = sum(row.state is State.SUCCEEDED for row in rows)
    print(f"{succeeded} of {len(rows)} jobs {'fit' if judged else 'succeeded'}")
    print(tensorboard_command(folder), flush=True)


def _outcomes(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE)
    for heading in ("job", "overrides", "state", "result"):
        table.add_column(heading, overflow="fold")
    table.add_column("seconds", justify="right")
    for row in rows:
        state = Text(row.state.value, style=row.state.colour)
        table.add_row(
            str(row.number),
            Text(" ".join(row.overrides)),
            state,
            Text(_result(row)),
            f"{row.seconds:.1f}",
        )
    return table


_VERDICT = ("memory of a chip", "of", "roof ms", "estimate ms", "examples/s", "MFU at most")


def _verdicts(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE)
    for heading in ("job", "overrides", "verdict"):
        table.add_column(heading, overflow="fold")
    for heading in (*_VERDICT, "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        fits = row.state is State.SUCCEEDED
        said = "fits" if fits else "does not fit" if row.preflight else row.reason
        table.add_row(
            str(row.number),
            Text(" ".join(row.overrides)),
            Text(said, style="green" if fits else "red"),
            *_verdict_cells(row.preflight),
            f"{row.seconds:.1f}",
        )
    return table


def _verdict_cells(report: PreflightReport | None) -> list[str]:
    if report is None:
        return [""] * len(_VERDICT)
    cells = [size(report.hbm.total), f"{report.hbm.total / report.hbm.capacity:.0%}"]
    roof, estimate = report.roof, report.estimate
    if roof is None or estimate is None:
        return [*cells, *[""] * (len(_VERDICT) - len(cells))]
    return [
        *cells,
        f"{1e3 * roof.step_s:.3g}",
        f"{1e3 * estimate.step_s:.3g}",
        f"{roof.examples_per_s:,.0f}",
        f"{roof.mfu:.1%}",
    ]


def _result(row: Row) -> str:
    if row.state is State.SUCCEEDED:
        return " ".join(f"{name}={value:.4g}" for name, value in row.final.items())
    return row.reason
