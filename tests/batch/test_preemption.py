"""A preemption costs nothing but time, also in the middle of a compile."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import shutil
import signal
import subprocess
from typing import Any

import pytest

from runner.batch.attempt import AttemptRun
from runner.batch.child import start_child
from runner.batch.seat import Seat
from runner.observe.console import Console
from runner.observe.observer import Observer
from runner.record.errors import ExitCode
from runner.record.manifest import folder_name
from runner.record.outcome import Attempt
from runner.record.rundir import RunDir
from runner.record.storage import LocalStorage
from runner.train.checkpoint import load
from tests.batch import runs

#: A job whose step takes the compiler seconds.
SLOW = {"model__fault": "compile", "model__at": 1, "backend__name": "openxla_step"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of that job that has come to step 2."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    result, _ = runs.run(folder, steps=2, **SLOW)
    assert result.exit_code == 0
    return folder


def terminated_in_a_compile(folder: pathlib.Path, **changes: Any) -> int:
    """Go on with the run, and preempt it as soon as it compiles; returns the exit code."""
    with runs.parent(folder, steps=10_000, **SLOW, **changes) as parent:
        read_until(parent, "compiling step")
        parent.send_signal(signal.SIGTERM)
        read_until(parent, "SIGTERM: stopping after this step or compile")
        return parent.wait(timeout=120)


def read_until(parent: subprocess.Popen[str], words: str) -> None:
    assert parent.stdout is not None
    for line in parent.stdout:
        if words in line:
            return
    pytest.fail(f"the runner ended without saying {words!r}")


def test_a_compile_that_outlasts_the_grace_time_loses_nothing_that_was_saved(
    saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    run_dir = RunDir(folder)
    code = terminated_in_a_compile(folder, timeouts__grace_s=0.3)
    result = runs.result_json(run_dir)
    assert (code, result["state"]) == (ExitCode.PREEMPTED, "preempted")
    assert "still compiling after 0.3 s (timeouts.grace_s)" in result["reason"]
    assert result["attempts"][-1]["lost_steps"] == 0
    storage = LocalStorage(run_dir.checkpoints)
    assert storage.names() == [folder_name(2)]
    load(storage, folder_name(2))


def test_a_compile_that_ends_within_the_grace_time_is_followed_by_a_step_and_a_save(
    saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    run_dir = RunDir(folder)
    code = terminated_in_a_compile(folder, timeouts__grace_s=300.0)
    result = runs.result_json(run_dir)
    assert (code, result["state"]) == (ExitCode.PREEMPTED, "preempted")
    step = result["steps"]
    assert step > 2
    assert f"preempted by SIGTERM after step {step}" in result["reason"]
    assert LocalStorage(run_dir.checkpoints).steps() == [step, 2]
    assert result["attempts"][-1]["lost_steps"] == 0


class Terminated:
    """A stop that was asked for by SIGTERM."""

    interrupts, terminated, asked = 0, True, True

    def verdict(self, attempt: Attempt) -> Attempt:
        return attempt


class Told:
    """A worker that notes what reaches it."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def signal(self, number: signal.Signals) -> None:
        self.told.append(number.name)

    def kill(self) -> None:
        self.told.append("killed")


def test_the_grace_time_begins_when_the_worker_is_told(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    config, display = runs.config(), Console(stderr=io.StringIO(), stdout=io.StringIO())
    attempt = AttemptRun(
        run_dir,
        observer=Observer(run_dir, config=config, console=display),
        seat=Seat(display, Terminated(), start_child),
        timeouts=dataclasses.replace(config.timeouts, grace_s=60.0),
        on_started=lambda: None,
        on_saved=lambda: None,
    )
    worker: Any = Told()
    # The signal came between the two.
    attempt._end_if_due(worker)
    attempt._forward(worker)
    attempt._end_if_due(worker)
    assert worker.told == ["SIGTERM"]


def test_a_terminal_that_closes_is_a_preemption(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with runs.parent(run_dir.path, steps=10_000, model__step_s=0.05) as parent:
        runs.wait_for_step(run_dir, 2)
        assert parent.stdout is not None
        parent.stdout.close()
        parent.send_signal(signal.SIGHUP)
        assert parent.wait(timeout=60) == ExitCode.PREEMPTED
    result = runs.result_json(run_dir)
    assert LocalStorage(run_dir.checkpoints).steps() == [result["steps"]]
