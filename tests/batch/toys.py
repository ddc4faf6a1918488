"""Batches of toy jobs through the real command line, in a process of their own."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from tests.batch.runs import started

ROOT = pathlib.Path(__file__).parents[2]

_JOB = """\
# @package _global_
job: {name: toy, entry: "tests.faulty:Faulty"}
data: {name: toy, entry: "tests.faulty:numbers"}
backend: {name: eager}
steps: 3
model: {fault: none, at: 2, step_s: 0.0, diary: DIARY, width: 1}
retries: {failures: 0, backoff_s: 0.0}
"""
#: Puts the toy worker in the place of the real one, and fake chips in the place of real ones.
_START = """\
import sys
import runner.batch.child as child
import runner.batch.slots as slots
child.WORKER = "tests.batch.toy_worker"
chips = int(sys.argv.pop(1))
if chips:
    slots.plan_slots = lambda hardware, batch: slots.tpu_slots(
        chips, batch.chips_per_job or 1, most=batch.max_concurrent
    )
    import runner.batch.batch
    runner.batch.batch.plan_slots = slots.plan_slots
from runner.__main__ import main
sys.exit(main())
"""


class Toys:
    """A folder in which batches of toy jobs are run."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.diary = folder / "diary.txt"
        (folder / "conf" / "job").mkdir(parents=True)
        text = _JOB.replace("DIARY", str(self.diary))
        (folder / "conf" / "job" / "toy.yaml").write_text(text)

    def argv(self, *arguments: str, chips: int = 0) -> list[str]:
        """The command line of a batch named `b`."""
        conf = str(self.folder / "conf")
        start = [sys.executable, "-c", _START, str(chips), "--config-dir", conf]
        return [*start, "-m", "job=toy", "batch.name=b", *arguments]

    def run(self, *arguments: str, chips: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a batch to its end."""
        return self._run(self.argv(*arguments, chips=chips))

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m runner` with these arguments and the toy worker."""
        return self._run([sys.executable, "-c", _START, "0", *arguments])

    def _run(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv,
            cwd=self.folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def start(
        self, *arguments: str, chips: int = 0
    ) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """A batch that can be sent signals; killed if it is left running."""
        return started(
            self.argv(*arguments, chips=chips), cwd=self.folder, environment=_environment()
        )

    def background(
        self, *arguments: str
    ) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """As `command`, but it goes on while it is looked at; killed if it is left running."""
        argv = [sys.executable, "-c", _START, "0", *arguments]
        return started(argv, cwd=self.folder, environment=_environment())

    @property
    def batch(self) -> pathlib.Path:
        """The batch's folder."""
        return self.folder / "multirun" / "b"

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs of sweep.json."""
        found: list[dict[str, Any]] = json.loads((self.batch / "sweep.json").read_text())["jobs"]
        return found

    def states(self) -> list[str]:
        """Every job's state, by number."""
        return [job["state"] for job in self.jobs()]

    def written(self) -> list[list[str]]:
        """The diary's lines: seed, what, chips, process, when, when the process began."""
        if not self.diary.exists():
            return []
        return [line.split() for line in self.diary.read_text().splitlines()]

    def count(self, what: str) -> collections.Counter[str]:
        """How often each seed wrote `what`."""
        return collections.Counter(line[0] for line in self.written() if line[1] == what)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RUNNER_TRUST": "tests", "TERM": "dumb"}
