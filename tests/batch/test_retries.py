"""What deserves another try gets one, from the newest checkpoint, until its budget is used up."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from typing import Any

import pytest

from runner.batch.retries import Budgets, is_deadly
from runner.config.schema import RetriesConfig
from runner.record.errors import ExitCode, Fault
from runner.record.outcome import Attempt, State
from runner.record.rundir import RunDir
from runner.record.storage import LocalStorage
from tests.batch import runs

STEPS = 8


def once(folder: pathlib.Path, fault: str, **changes: Any) -> dict[str, Any]:
    """A run that saves every other step and goes wrong once, at its fifth."""
    memory = str(folder / "memory")
    settings = {"model__fault": fault, "model__at": 5, "model__times": 1, "model__memory": memory}
    return {"steps": STEPS, "checkpoint__every_steps": 2, **settings, **changes}


def journal(run_dir: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]


def losses(run_dir: RunDir) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in journal(run_dir) if "train/loss" in line}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run to which nothing happened."""
    result, run_dir = runs.run(tmp_path_factory.mktemp("whole") / "run", steps=STEPS)
    assert result.state is State.SUCCEEDED
    return losses(run_dir)


@pytest.mark.parametrize(
    ("fault", "budget", "exit_code", "cause"),
    [
        ("kill", "failures", ExitCode.BUG, "killed by SIGKILL"),
        ("raise", "failures", ExitCode.BUG, "RuntimeError: the job's own error"),
        ("exit", "failures", ExitCode.BUG, "exit code 3 without a word"),
        ("preempt", "preemptions", ExitCode.PREEMPTED, "preempted by SIGTERM after step 5"),
        ("busy", "infrastructure", ExitCode.DEVICE, "Device or resource busy"),
        ("memory", None, ExitCode.DEVICE, "out of host memory"),
    ],
)
def test_one_fault_costs_an_attempt_and_no_number(
    tmp_path: pathlib.Path,
    whole: dict[int, float],
    fault: str,
    budget: str | None,
    exit_code: ExitCode,
    cause: str,
) -> None:
    budgets = {f"retries__{budget}": 1} if budget else {}
    result, run_dir = runs.run(tmp_path / "run", **once(tmp_path, fault, **budgets))
    assert (result.state, result.steps) == (State.SUCCEEDED, STEPS)
    first, second = result.attempts
    assert first.exit_code == exit_code
    assert cause in first.cause
    # A process that is ended at once takes the save that is under way with it.
    expected = {"preempt": (5,), "kill": (2, 4), "exit": (2, 4)}.get(fault, (4,))
    assert second.first_step in expected
    assert first.saved_step <= second.first_step
    assert first.lost_steps <= first.steps - first.saved_step
    assert losses(run_dir) == whole
    assert len(journal(run_dir)) == STEPS + 1, "each step once, and one evaluation"


@pytest.mark.parametrize(
    ("changes", "attempts", "exit_code"),
    [
        ({"model__fault": "raise", "retries__failures": 2}, 3, ExitCode.BUG),
        ({"model__fault": "busy", "retries__infrastructure": 1}, 2, ExitCode.DEVICE),
        ({"model__fault": "memory", "retries__failures": 5}, 2, ExitCode.DEVICE),
        ({"model__fault": "nan", "retries__failures": 5}, 1, ExitCode.NON_FINITE),
        ({"data__options": {"broken_from": 2}, "retries__failures": 5}, 1, ExitCode.DATA),
        ({"job__batch_size": 65, "retries__failures": 5}, 1, ExitCode.CONFIG),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_budget_ends(
    tmp_path: pathlib.Path, changes: dict[str, Any], attempts: int, exit_code: ExitCode
) -> None:
    result, run_dir = runs.run(tmp_path / "run", **changes)
    assert len(result.attempts) == attempts
    assert result.exit_code == exit_code
    assert len(runs.result_json(run_dir)["attempts"]) == attempts


def test_the_end_says_what_happened(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = once(tmp_path, "kill", retries__failures=1)
    _, run_dir = runs.run(tmp_path / "run", **changes)
    shown = capfd.readouterr()
    assert "trying again in 0 s (0 more after failure)" in shown.err
    assert "lost): the worker was killed by SIGKILL" in shown.out
    assert "to step 8: done" in shown.out
    assert "steps lost" in shown.out
    content = runs.result_json(run_dir)
    assert content["goodput"]["lost_s"] > 0
    assert [attempt["fault"] for attempt in content["attempts"]] == ["failure", ""]


def test_a_worker_that_the_kernel_killed_for_memory_is_told_from_one_that_was_shot(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = pathlib.Path("/sys/fs/cgroup/memory/runner-test")
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(700 << 20))
    except OSError:
        pytest.skip("no memory control group can be made here")
    monkeypatch.setenv("TEST_MEMORY_GROUP", str(group))
    try:
        result, _ = runs.run(tmp_path / "run", **once(tmp_path, "starve"))
    finally:
        group.rmdir()
    assert result.state is State.SUCCEEDED
    assert "out of host memory: the kernel killed the worker" in result.attempts[0].cause
    assert result.attempts[0].exit_code == ExitCode.DEVICE


def test_sigterm_to_the_runner_is_not_retried_and_resume_goes_on(
    tmp_path: pathlib.Path,
) -> None:
    folder, changes = tmp_path / "run", {"steps": 60, "model__step_s": 0.05}
    run_dir = RunDir(folder)
    with runs.parent(folder, **changes) as parent:
        runs.wait_for_step(run_dir, 2)
        parent.terminate()
        assert parent.wait(timeout=60) == ExitCode.PREEMPTED
    first = runs.result_json(run_dir)
    assert "preempted by SIGTERM after step" in first["reason"]
    (step,) = LocalStorage(run_dir.checkpoints).steps()
    assert step == first["steps"]
    result, _ = runs.run(folder, **{**changes, "model__step_s": 0.05})
    assert [a.first_step for a in result.attempts] == [0, step]
    assert result.steps == 60
    assert [line["step"] for line in journal(run_dir)] == [*range(1, 61), 60]
    assert result.goodput.productive_s > first["goodput"]["productive_s"] > 0


def test_after_the_runner_was_killed_the_same_command_goes_on(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    changes = {"steps": 40, "model__step_s": 0.05, "checkpoint__every_steps": 3}
    run_dir = RunDir(folder)
    with runs.parent(folder, **changes) as parent:
        runs.wait_for_step(run_dir, 8)
        worker = runs.worker_pid(run_dir)
        parent.kill()
        parent.wait(timeout=60)
    runs.wait_until(lambda: not runs.alive(worker))
    assert runs.result_json(run_dir)["state"] == "running"
    result, _ = runs.run(folder, **changes)
    killed, last = result.attempts
    assert killed.cause == "the runner itself was ended without a word"
    assert last.first_step >= 6
    assert killed.steps - killed.lost_steps == last.first_step
    assert [line["step"] for line in journal(run_dir)] == [*range(1, 41), 40]


def test_a_stop_while_waiting_for_the_next_attempt_ends_the_run(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    changes = {"model__fault": "raise", "retries__failures": 3, "retries__backoff_s": 300.0}
    with runs.parent(run_dir.path, **changes) as parent:
        assert parent.stdout is not None
        while "trying again in 60 s" not in parent.stdout.readline():
            pass
        os.kill(parent.pid, signal.SIGINT)
        assert parent.wait(timeout=60) == ExitCode.INTERRUPTED
        assert runs.result_json(run_dir)["state"] == "cancelled"


def attempt(fault: Fault, *, first: int = 0, saved: int = 0) -> Attempt:
    return Attempt("x", 70, first, 1.0, fault, first_step=first, saved_step=saved)


def test_budgets_are_separate_and_full_again_after_progress() -> None:
    budgets = Budgets(RetriesConfig(failures=2, infrastructure=1, backoff_s=2.0), saved_step=10)
    assert budgets.wait_s(attempt(Fault.FAILURE)) == 2.0
    assert budgets.wait_s(attempt(Fault.INFRASTRUCTURE)) == 4.0
    assert budgets.wait_s(attempt(Fault.PREEMPTION)) == 0.0
    assert budgets.wait_s(attempt(Fault.FAILURE)) == 16.0
    assert budgets.wait_s(attempt(Fault.FAILURE, saved=10)) is None, "nothing new was saved"
    assert budgets.wait_s(attempt(Fault.FAILURE, saved=11)) == 2.0
    assert budgets.wait_s(attempt(Fault.FINAL)) is None
    assert budgets.wait_s(attempt(Fault.NONE)) is None


def test_preemptions_have_no_limit_unless_one_is_set() -> None:
    endless = Budgets(RetriesConfig(), saved_step=0)
    assert all(endless.wait_s(attempt(Fault.PREEMPTION)) == 0.0 for _ in range(1000))
    limited = Budgets(RetriesConfig(preemptions=0), saved_step=0)
    assert limited.wait_s(attempt(Fault.PREEMPTION)) is None


def test_two_deaths_in_a_row_from_one_checkpoint_are_deadly() -> None:
    death = attempt(Fault.FAILURE, first=5)
    assert not is_deadly([death], step=5)
    assert is_deadly([death, death], step=5)
    assert not is_deadly([death, death], step=6)
    assert not is_deadly([death, attempt(Fault.FAILURE, first=5, saved=6)], step=5)
    assert not is_deadly([death, attempt(Fault.PREEMPTION, first=5)], step=5)
    assert not is_deadly([death, attempt(Fault.FAILURE, first=-1)], step=5)
