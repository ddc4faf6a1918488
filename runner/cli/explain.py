"""The command that says which operations of a run's training step cost most."""

from __future__ import annotations

import pathlib

from google.protobuf.message import DecodeError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.batch.ledger import FILE_NAME
from runner.config.stored import read_config
from runner.observe.operations import Costs, costs_of
from runner.observe.xplane import read_xplane
from runner.record.errors import ConfigError, ExitCode
from runner.record.preflight import Estimate, preflight_of
from runner.record.rundir import RunDir

_ROWS = 10
#: What it takes to have something to explain.
_HOW = (
    "start a run with profile.steps=[20,25] (any backend but eager), or mode=preflight for what "
    "the TPU compiler estimates"
)


def explain(folder: str) -> int:
    """Print the dearest operations of a run, from its profile or its preflight.

    Raises:
        ConfigError: The folder is no run, or the run has neither.
    """
    run_dir = RunDir(pathlib.Path(folder))
    if (run_dir.path / FILE_NAME).exists():
        raise ConfigError(f"explain needs one run; {folder} is a batch: give one of its jobs")
    if not run_dir.config.exists():
        raise ConfigError(f"explain needs a run folder with config.yaml; got {folder!r}")
    report = preflight_of(run_dir)
    if report is not None and report.estimate is not None:
        Console().print(_estimated(report.estimate))
        return ExitCode.DONE
    traces = sorted(run_dir.tensorboard.glob("plugins/profile/*/*.xplane.pb"))
    if not traces:
        raise ConfigError(f"{folder} has no profile: {_HOW}")
    try:
        costs = costs_of(read_xplane(traces[-1]))
    except (OSError, DecodeError) as error:
        raise ConfigError(f"the profile {traces[-1]} cannot be read: {error}") from error
    if not costs.operations:
        raise ConfigError(
            f"the profile {traces[-1]} tells no operations of XLA's CPU device: {_HOW}"
        )
    updates = costs.calls * read_config(run_dir.config).backend.steps_per_call
    Console().print(_measured(costs, updates=max(1, updates)))
    return ExitCode.DONE


def _measured(costs: Costs, *, updates: int) -> Table:
    total = costs.total_ms
    table = _table(f"{total / updates:.2f} ms of operations an update, in {updates} updates")
    for heading in ("runs", "ms an update", "share"):
        table.add_column(heading, justify="right")
    for one in costs.operations[:_ROWS]:
        figures = (f"{one.runs:,}", f"{one.total_ms / updates:.3f}", f"{one.total_ms / total:.1%}")
        table.add_row(*_words(one.module, one.phase, one.name), *figures)
    if not any(one.phase for one in costs.operations):
        table.caption = "Modules are known of backend=openxla_step only."
    return table


def _estimated(estimate: Estimate) -> Table:
    table = _table(f"{1e3 * estimate.step_s:.2f} ms a step, by the TPU compiler's estimate")
    for heading in ("cycles", "share"):
        table.add_column(heading, justify="right")
    for one in estimate.operations[:_ROWS]:
        figures = (f"{one.cycles:,}", f"{one.cycles / max(estimate.cycles, 1):.1%}")
        table.add_row(*_words(one.module, one.phase, f"{one.opcode} {one.name}"), *figures)
    return table


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE, title=Text(title), title_justify="left")
    for heading in ("module", "phase", "operation"):
        table.add_column(heading, overflow="fold")
    return table


def _words(module: str, phase: str, operation: str) -> tuple[Text, Text, Text]:
    return Text(module or "-"), Text(phase or "-"), Text(operation)
