"""Runs of the faulty job in real processes, through the real supervisor."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from runner.batch.supervise import RunPlan, supervise
from runner.config.codec import config_from_json, config_to_json
from runner.config.schema import Config
from runner.record.outcome import Result
from runner.record.rundir import RunDir

ROOT = pathlib.Path(__file__).parents[2]


def config(**changes: Any) -> Config:
    """A small run of the faulty job on the `eager` backend; keys with dots reach inside."""
    plain: dict[str, Any] = {
        "job": {"name": "faulty", "entry": "tests.faulty:Faulty", "batch_size": 8},
        "data": {
            "name": "numbers",
            "entry": "tests.faulty:numbers",
            "options": {"broken_from": None},
        },
        "backend": {"name": "eager"},
        "optim": {"name": "SGD", "lr": 0.1},
        "schedule": {"name": "constant"},
        "hardware": {"name": "cpu"},
        "steps": 6,
        "model": {"fault": "none", "at": 3, "step_s": 0.0, "times": None, "memory": None},
        "checkpoint": {},
        "retries": {"failures": 0, "infrastructure": 0, "backoff_s": 0.0},
        "timeouts": {},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        target = plain
        for section in sections:
            target = target[section]
        target[name] = value
    return config_from_json(plain)


def run(folder: pathlib.Path, **changes: Any) -> tuple[Result, RunDir]:
    """Supervise a run in this process."""
    run_dir, asked = RunDir(folder), config(**changes)
    text = yaml.safe_dump(config_to_json(asked))
    plan = RunPlan(overrides=["fault"], config_yaml=text, tensorboard_root=folder)
    return supervise(asked, run_dir, plan=plan), run_dir


def result_json(run_dir: RunDir) -> dict[str, Any]:
    """The result file's content."""
    content: dict[str, Any] = json.loads(run_dir.result.read_text())
    return content


@contextlib.contextmanager
def parent(folder: pathlib.Path, **changes: Any) -> Iterator[subprocess.Popen[str]]:
    """A parent of its own in a new process, to be sent signals; killed if it is left running."""
    request = json.dumps({"folder": str(folder), "changes": changes})
    code = (
        "import json, signal, sys, pathlib; from tests.batch import runs; "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # the tests may run under nohup
        "asked = json.loads(sys.argv[1]); "
        "result, _ = runs.run(pathlib.Path(asked['folder']), **asked['changes']); "
        "sys.exit(result.exit_code)"
    )
    with started([sys.executable, "-c", code, request], cwd=ROOT) as process:
        yield process


@contextlib.contextmanager
def started(
    argv: Sequence[str], *, cwd: pathlib.Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, its output read together; killed if left running."""
    with subprocess.Popen(
        argv,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_step(run_dir: RunDir, step: int, *, limit_s: float = 60.0) -> None:
    """Wait until the journal shows the step."""
    wait_until(lambda: last_step(run_dir) >= step, limit_s=limit_s)


def last_step(run_dir: RunDir) -> int:
    """The newest step in the journal; 0 before the first."""
    try:
        lines = run_dir.metrics.read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_until(condition: Any, *, limit_s: float = 60.0) -> None:
    """Poll until the condition holds.

    Raises:
        TimeoutError: It does not in time.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.02)


def worker_pid(run_dir: RunDir) -> int:
    """The process id that the worker gave."""
    content = json.loads(run_dir.environment.read_text())
    pid: int = content["device"]["pid"]
    return pid


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")
