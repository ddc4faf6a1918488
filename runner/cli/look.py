"""The commands that look at what there is: `ls` and `report`."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.cli.catalog import PLACES, Found, find, run_folders
from runner.observe.history import read_history
from runner.observe.progress import duration
from runner.observe.report import TAGS, report_page
from runner.record.errors import ConfigError, ExitCode
from runner.record.files import write_atomic

#: Columns without a terminal: enough that no line is folded, since a program may read them.
_NO_TERMINAL_WIDTH = 10_000


def add_ls(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ls`."""
    parser.add_argument("folder", nargs="?", help="default: outputs and multirun")


def add_report(parser: argparse.ArgumentParser) -> None:
    """The arguments of `report`."""
    parser.add_argument("folder", help="the folder of a run, of a batch, or of several")
    parser.add_argument("--to", type=pathlib.Path, help="default: report.html in the folder")


def ls(asked: argparse.Namespace) -> int:
    """List runs and batches."""
    roots = [pathlib.Path(asked.folder)] if asked.folder else [pathlib.Path(p) for p in PLACES]
    if asked.folder and not roots[0].is_dir():
        raise ConfigError(f"ls needs a folder; got {asked.folder!r}")
    table = Table(box=box.SIMPLE)
    for heading in ("folder", "state"):
        table.add_column(heading, overflow="fold")
    for heading in ("steps", "ms/step", "compile", "time"):
        table.add_column(heading, justify="right")
    table.add_column("result", overflow="fold")
    for root in roots:
        for found in find(root):
            table.add_row(*_row(found))
    if not table.row_count:
        print(f"no runs in {' or '.join(map(str, roots))}")
        return ExitCode.DONE
    Console(width=None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH).print(table)
    return ExitCode.DONE


def report(asked: argparse.Namespace) -> int:
    """Write a report on the runs in a folder."""
    root = pathlib.Path(asked.folder)
    runs = [
        run
        for path in run_folders(root)
        if (run := read_history(path, name=_name(path, root), tags=TAGS)) is not None
    ]
    if not runs:
        raise ConfigError(f"report needs a folder with runs in it; got {asked.folder!r}")
    to = asked.to or root / "report.html"
    write_atomic(to, report_page(f"{root.absolute().name}: {len(runs)} runs", runs))
    print(to)
    return ExitCode.DONE


def _name(path: pathlib.Path, root: pathlib.Path) -> str:
    return path.absolute().name if path == root else os.fspath(path.relative_to(root))


def _row(found: Found) -> tuple[str | Text, ...]:
    folder = Text(os.fspath(found.path))
    if found.result is None:
        counts = ", ".join(f"{count} {state.value}" for state, count in found.states.items())
        jobs = sum(found.states.values())
        good = all(state.good for state in found.states)
        state = Text("batch", style="green" if good else "yellow")
        return folder, state, "", "", "", "", Text(f"{jobs} jobs: {counts}")
    result = found.result
    final = " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in result.final.items()
    )
    median_ms = result.step.median_ms
    return (
        folder,
        Text(result.state.value, style=result.state.colour),
        f"{result.steps:,}",
        "" if median_ms is None else f"{median_ms:.1f}",
        f"{result.compile.total_s:.1f} s",
        duration(sum(attempt.seconds for attempt in result.attempts)),
        Text(result.reason or final),
    )
