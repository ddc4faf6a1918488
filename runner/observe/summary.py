"""The table that a run ends with."""

from __future__ import annotations

import os
import pathlib
import shlex
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.observe.preflight import print_preflight
from runner.observe.progress import duration
from runner.record.outcome import Attempt, CompileFigures, Result, State
from runner.record.preflight import report_from_json


def print_summary(console: Console, *, result: Result, logdir: pathlib.Path) -> None:
    """Print a run's table and the command that opens it in TensorBoard.

    Args:
        console: Where to.
        result: The run's figures.
        logdir: The folder for `tensorboard --logdir`: the run's, or that of its sweep.
    """
    if result.preflight is not None:
        print_preflight(console, report_from_json(result.preflight))
        return
    table = Table(show_header=False, title=Text(f"{result.job} ({result.backend})"))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in _rows(result):
        good = result.state is State.SUCCEEDED or name != "state"
        table.add_row(Text(name), Text(value, style="" if good else "red"))
    console.print(table)
    console.print(Text(tensorboard_command(logdir)), soft_wrap=True)


def tensorboard_command(logdir: pathlib.Path) -> str:
    """The command, safe to paste into a shell."""
    return f"tensorboard --logdir {shlex.quote(os.fspath(logdir))}"


def _rows(result: Result) -> Iterator[tuple[str, str]]:
    code = "" if result.exit_code in (0, None) else f" (exit code {result.exit_code})"
    yield "state", f"{result.state.value}{code}"
    yield "steps", f"{result.steps:,}"
    yield "compile", _compile(result.compile)
    step = result.step
    if step.median_ms is not None and step.p95_ms is not None:
        yield "step", f"{step.median_ms:.2f} ms median, {step.p95_ms:.2f} ms p95"
    if result.throughput.examples_per_s is not None:
        yield "throughput", f"{result.throughput.examples_per_s:,.1f} examples/s"
    if result.throughput.tokens_per_s is not None:
        yield "", f"{result.throughput.tokens_per_s:,.0f} tokens/s"
    if result.mfu is not None:
        yield "mfu", f"{result.mfu:.1%}"
    if len(result.attempts) > 1:
        yield "attempts", str(len(result.attempts))
        for number, attempt in enumerate(result.attempts, 1):
            yield f"  {number}", _attempt(attempt)
        lost = sum(attempt.lost_steps for attempt in result.attempts)
        good = result.goodput
        yield "goodput", f"{duration(good.productive_s)} productive, {duration(good.lost_s)} lost"
        yield "steps lost", f"{lost:,}"
    for name, value in result.final.items():
        yield name, f"{value:.6g}"


def _attempt(attempt: Attempt) -> str:
    began = f"from step {attempt.first_step:,} " if attempt.first_step > 0 else ""
    lost = f" ({attempt.lost_steps:,} lost)" if attempt.lost_steps else ""
    return f"{began}to step {attempt.steps:,}{lost}: {attempt.cause or 'done'}"


def _compile(figures: CompileFigures) -> str:
    again = f", {figures.recompiles} of them after warm-up" if figures.recompiles else ""
    graphs = "compile" if figures.count == 1 else "compiles"
    return f"{figures.total_s:.1f} s in {figures.count} {graphs}{again}"
