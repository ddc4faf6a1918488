"""What a batch has come to: the table at its end, `sweep.csv`, `sweep.json`, the best job."""

from __future__ import annotations

import csv
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from runner.batch.ledger import Entry
from runner.batch.table import Line, print_table, said
from runner.config.mistakes import listed
from runner.config.schema import BatchConfig
from runner.observe.summary import tensorboard_command
from runner.record.files import strict_json, write_atomic, write_json
from runner.record.outcome import State
from runner.record.preflight import preflight_of
from runner.record.rundir import RunDir

SCHEMA = 1
#: What jobs are compared by when nobody says it, the first that there is.
_METRICS = ("eval/loss", "train/loss")


def finish(entries: Mapping[int, Entry], settings: BatchConfig, *, folder: pathlib.Path) -> None:
    """Write the batch's files and print its table."""
    rows = [entries[number] for number in sorted(entries)]
    metric = settings.metric or next((name for name in _METRICS if _has(rows, name)), None)
    best = best_of(rows, metric, largest=settings.best == "max")
    write_atomic(folder / "sweep.csv", _csv(rows))
    write_json(folder / "sweep.json", strict_json(_summary(rows, metric, best)))
    print_table([_line(row, folder) for row in rows])
    print(_best_line(rows, metric, best))
    print(tensorboard_command(folder), flush=True)


def best_of(rows: Sequence[Entry], metric: str | None, *, largest: bool) -> Entry | None:
    """The job that succeeded with the best value; the first of equals."""
    if metric is None:
        return None
    sign = -1.0 if largest else 1.0
    able = [row for row in rows if _value(row, metric) is not None]
    return min(able, key=lambda row: sign * (_value(row, metric) or 0.0), default=None)


def _line(row: Entry, folder: pathlib.Path) -> Line:
    report = preflight_of(RunDir(folder / row.folder))
    result = said(row.state, row.final, row.reason)
    return Line(row.number, row.label, row.state, result, row.tries, row.seconds, report)


def _best_line(rows: Sequence[Entry], metric: str | None, best: Entry | None) -> str:
    if best is None or metric is None:
        names = sorted({name for row in rows for name in row.final})
        there_are = listed(names) or "none"
        if metric is None:
            return "no best job: none succeeded with a loss"
        return f"no best job: none succeeded with the metric {metric}; there are: {there_are}"
    return f"best {metric}: {best.final[metric]:.6g}, job {best.number} ({best.label})"


def _has(rows: Sequence[Entry], metric: str) -> bool:
    return any(_value(row, metric) is not None for row in rows)


def _value(row: Entry, metric: str) -> float | None:
    value = row.final.get(metric)
    usable = row.state is State.SUCCEEDED and value is not None and math.isfinite(value)
    return value if usable else None


def _csv(rows: Sequence[Entry]) -> str:
    """One line a job: what is known of every job, then its overrides, then its metrics."""
    given = [dict(_split(line) for line in row.overrides) for row in rows]
    keys = list(dict.fromkeys(key for each in given for key in each))
    metrics = sorted({name for row in rows for name in row.final})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fixed = ("job", "state", "exit_code", "reason", "tries", "seconds", "steps", "folder")
    writer.writerow([*fixed, *keys, *metrics])
    for row, overrides in zip(rows, given, strict=True):
        known = (row.number, row.state.value, row.exit_code, row.reason)
        writer.writerow(
            [
                *known,
                *(row.tries, row.seconds, row.steps, row.folder),
                *(overrides.get(key, "") for key in keys),
                *(row.final.get(name, "") for name in metrics),
            ]
        )
    return text.getvalue()


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key, value


def _summary(rows: Sequence[Entry], metric: str | None, best: Entry | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "jobs": [row.to_json() for row in rows],
        "metric": metric,
        "best": best.number if best else None,
    }
