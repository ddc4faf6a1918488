"""Trains every job on the data that it has by itself, by every backend that trains, to a mark.

Each cell is `python -m runner job=JOB backend=BACKEND` with the job's own settings, its start and
its compiles included in the seconds, and the held-out metric of its end. bert_classifier has no
data of its own and is left out. Exit code 1: a mark was missed, or the time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from runner.config.names import TRAINING_BACKENDS

LIMIT_S = 180.0


@dataclasses.dataclass(frozen=True)
class Mark:
    """What a job must reach: at least, or at most if less is better."""

    metric: str
    value: float
    less_is_better: bool = False

    def met(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value <= self.value if self.less_is_better else value >= self.value


MARKS = {
    "mlp": Mark("eval/accuracy", 0.93),
    "resnet": Mark("eval/accuracy", 0.95),
    "vit": Mark("eval/accuracy", 0.90),
    "gpt": Mark("eval/bits_per_byte", 2.6, less_is_better=True),
    "bert": Mark("eval/accuracy", 0.32),  # always guessing the space gives 0.236
    "llama": Mark("eval/bits_per_byte", 2.6, less_is_better=True),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One job by one backend; `value` is None where it failed."""

    job: str
    backend: str
    value: float | None
    seconds: float
    steps: int
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether mark and time limit were met."""
        return self.value is not None and MARKS[self.job].met(self.value) and self.in_time

    @property
    def in_time(self) -> bool:
        """Whether it took less than the limit."""
        return self.seconds < LIMIT_S


def main() -> int:
    """Train, print the table, write the JSON."""
    asked = _arguments()
    cells = []
    for job in asked.jobs:
        for backend in asked.backends:
            cells.append(_train(job, backend))
            print(_line(cells[-1]), file=sys.stderr, flush=True)
    _show(cells)
    if asked.json:
        asked.json.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells], indent=2))
    return 0 if all(cell.passed for cell in cells) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench marks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", nargs="+", choices=MARKS, default=list(MARKS))
    parser.add_argument(
        "--backends", nargs="+", choices=TRAINING_BACKENDS, default=list(TRAINING_BACKENDS)
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures")
    return parser.parse_args()


def _train(job: str, backend: str) -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "runner", f"job={job}", f"backend={backend}", "log_every=10"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no word"]
            return Cell(job, backend, None, seconds, 0, said[-1])
        (path,) = pathlib.Path(folder).glob("outputs/*/*/result.json")
        result = json.loads(path.read_text())
    value = result["final"][MARKS[job].metric]
    return Cell(job, backend, value, seconds, result["steps"])


def _line(cell: Cell) -> str:
    return f"{cell.job} {cell.backend}: {_value(cell)}, {cell.seconds:.0f} s"


def _value(cell: Cell) -> str:
    return f"failed: {cell.why}" if cell.value is None else f"{cell.value:.3f}"


def _show(cells: Sequence[Cell]) -> None:
    table = Table(title=f"To the mark in less than {LIMIT_S:.0f} s")
    for heading in ("job", "mark", "backend"):
        table.add_column(heading)
    for heading in ("reached", "updates", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for cell in cells:
        mark = MARKS[cell.job]
        sign = "<=" if mark.less_is_better else ">="
        table.add_row(
            cell.job,
            f"{mark.metric} {sign} {mark.value}",
            cell.backend,
            _value(cell),
            str(cell.steps),
            f"{cell.seconds:.0f}",
            "" if cell.passed else "missed" if cell.in_time else "late",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
