"""The table at the end of a batch, under whichever launcher."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.observe.preflight import size
from runner.record.outcome import State
from runner.record.preflight import PreflightReport

_NO_TERMINAL_WIDTH = 160
_VERDICT = ("memory of a chip", "of", "roof ms", "estimate ms", "examples/s", "MFU at most")


@dataclasses.dataclass(frozen=True)
class Line:
    """A job in the table.

    Attributes:
        number: Its number in the batch.
        label: What tells it from the others.
        state: What became of it.
        result: Its metrics, or why it has none.
        tries: How often it was started.
        seconds: How long all its tries took.
        preflight: What its preflight found, if it was one.
    """

    number: int
    label: str
    state: State
    result: str
    tries: int
    seconds: float
    preflight: PreflightReport | None = None


def said(state: State, final: Mapping[str, float], reason: str) -> str:
    """A job's result or the reason for it, in one line."""
    if state is State.SUCCEEDED:
        return " ".join(f"{name}={value:.4g}" for name, value in final.items())
    return " ".join(reason.split())


def print_table(lines: Sequence[Line]) -> None:
    """Print one line a job, and how many succeeded; of preflights, the verdicts."""
    judged = any(line.preflight is not None for line in lines)
    console = Console(width=None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH)
    console.print(_verdicts(lines) if judged else _outcomes(lines))
    succeeded = sum(line.state is State.SUCCEEDED for line in lines)
    pruned = sum(line.state is State.PRUNED for line in lines)
    done = "fit" if judged else "succeeded"
    print(f"{succeeded} of {len(lines)} jobs {done}" + (f", {pruned} pruned" if pruned else ""))


def _outcomes(lines: Sequence[Line]) -> Table:
    table = Table(box=box.SIMPLE)
    for heading in ("job", "overrides", "state", "result"):
        table.add_column(heading, overflow="fold")
    for heading in ("tries", "seconds"):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            str(line.number),
            Text(line.label),
            Text(line.state.value, style=line.state.colour),
            Text(line.result),
            str(line.tries),
            f"{line.seconds:.1f}",
        )
    return table


def _verdicts(lines: Sequence[Line]) -> Table:
    table = Table(box=box.SIMPLE)
    for heading in ("job", "overrides", "verdict"):
        table.add_column(heading, overflow="fold")
    for heading in (*_VERDICT, "seconds"):
        table.add_column(heading, justify="right")
    for line in lines:
        fits = line.state is State.SUCCEEDED
        said = "fits" if fits else "does not fit" if line.preflight else line.result
        table.add_row(
            str(line.number),
            Text(line.label),
            Text(said, style="green" if fits else "red"),
            *_verdict_cells(line.preflight),
            f"{line.seconds:.1f}",
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
