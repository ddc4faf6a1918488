"""A worker that no longer goes forward is ended, and its log shows where it was."""

from __future__ import annotations

import json
import pathlib
import signal

import pytest

from runner.batch.watchdog import Watchdog
from runner.config.schema import TimeoutsConfig
from runner.record.errors import ExitCode
from runner.record.events import Alive, Compiled, GraphRecord, Phase
from runner.record.outcome import State
from runner.record.rundir import RunDir
from tests.batch import runs

GRAPH = GraphRecord("step", 1, 0.0, 0.0, "", 0, 0, "first call")


def test_a_hung_step_ends_with_74_and_its_stack_in_the_log(tmp_path: pathlib.Path) -> None:
    result, run_dir = runs.run(tmp_path / "run", model__fault="hang", timeouts__step_s=2.0)
    assert (result.exit_code, result.state) == (ExitCode.HANG, State.TIMED_OUT)
    assert "no sign of life for 2 s while training (timeouts.step_s)" in result.reason
    log = run_dir.log.read_text()
    assert "Current thread" in log or "Thread 0x" in log
    assert 'faulty.py", line' in log
    assert "in _hang" in log


def test_a_hung_compile_has_a_limit_of_its_own(tmp_path: pathlib.Path) -> None:
    result, run_dir = runs.run(
        tmp_path / "run",
        backend__name="openxla_step",
        model__fault="hang",
        model__at=1,
        timeouts__compile_s=2.0,
    )
    assert result.exit_code == ExitCode.HANG
    assert "while compiling (timeouts.compile_s)" in result.reason
    assert "in _hang" in run_dir.log.read_text()


def test_a_hang_is_retried_from_the_newest_checkpoint(tmp_path: pathlib.Path) -> None:
    result, _ = runs.run(
        tmp_path / "run",
        model__fault="hang",
        model__at=5,
        model__times=1,
        model__memory=str(tmp_path / "memory"),
        steps=8,
        checkpoint__every_steps=2,
        timeouts__step_s=2.0,
        retries__failures=1,
    )
    assert result.state is State.SUCCEEDED
    assert [a.exit_code for a in result.attempts] == [ExitCode.HANG, 0]
    assert result.attempts[1].first_step == 4


def test_a_worker_that_cannot_stop_in_its_grace_time_is_ended(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with runs.parent(run_dir.path, model__fault="hang", timeouts__grace_s=1.0) as parent:
        runs.wait_for_step(run_dir, 1)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(timeout=60) == ExitCode.PREEMPTED
    content = json.loads(run_dir.result.read_text())
    assert content["state"] == "preempted"
    assert "after 1 s (timeouts.grace_s) and was ended without saving" in content["reason"]


def test_each_phase_has_its_limit() -> None:
    now = 0.0
    limits = TimeoutsConfig(start_s=10.0, compile_s=100.0, step_s=1.0)
    dog = Watchdog(limits, clock=lambda: now)
    now = 9.0
    dog.see(Phase("building"))
    now = 19.0
    assert dog.overdue() is None
    now = 20.0
    assert dog.overdue() == "no sign of life for 10 s while building (timeouts.start_s)"
    dog.see(Phase("training"))
    dog.see(Phase("compiling", "step"))
    now = 119.0
    assert dog.overdue() is None
    dog.see(Compiled(GRAPH))
    assert dog.phase == "training"
    now = 120.5
    assert dog.overdue() == "no sign of life for 1 s while training (timeouts.step_s)"
    dog.see(Alive(3))
    assert dog.overdue() is None


@pytest.mark.parametrize("outer", ["training", "evaluating"])
def test_after_a_compile_comes_what_was_before(outer: str) -> None:
    dog = Watchdog(TimeoutsConfig())
    dog.see(Phase(outer))
    dog.see(Phase("compiling", "eval"))
    assert dog.phase == "compiling"
    dog.see(Compiled(GRAPH))
    assert dog.phase == outer
