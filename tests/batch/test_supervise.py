"""Whatever happens to a worker becomes an outcome with a reason, and the parent lives on."""

from __future__ import annotations

import json
import os
import pathlib
import signal

import pytest

from runner.record.errors import BusyError, ExitCode
from runner.record.outcome import State
from runner.record.rundir import RunDir
from tests.batch import runs


def test_a_run_that_ends_well_leaves_every_file_of_the_contract(tmp_path: pathlib.Path) -> None:
    result, run_dir = runs.run(tmp_path / "run with spaces")
    assert result.state is State.SUCCEEDED
    assert (result.exit_code, result.steps) == (0, 6)
    content = runs.result_json(run_dir)
    assert content["schema"] == 1
    assert content["state"] == "succeeded"
    assert content["attempts"][0]["steps"] == 6
    assert set(content["final"]) >= {"train/loss", "train/lr", "train/grad_norm", "eval/error"}
    for path in (run_dir.config, run_dir.overrides, run_dir.environment, run_dir.metrics):
        assert path.stat().st_size > 0
    assert list(run_dir.tensorboard.glob("events.out.tfevents.*"))
    environment = json.loads(run_dir.environment.read_text())
    assert environment["device"]["name"] == "cpu"
    assert "torch" in environment["versions"]


@pytest.mark.parametrize(
    ("changes", "exit_code", "state", "reason"),
    [
        ({"model__fault": "raise"}, ExitCode.BUG, State.FAILED, "RuntimeError: the job's own"),
        ({"model__fault": "build"}, ExitCode.BUG, State.FAILED, "KeyError: 'no such layer'"),
        ({"model__fault": "exit"}, ExitCode.BUG, State.FAILED, "exit code 3 without a word"),
        ({"model__fault": "kill"}, ExitCode.BUG, State.FAILED, "killed by SIGKILL"),
        ({"model__fault": "nan"}, ExitCode.NON_FINITE, State.FAILED, "at step 3"),
        ({"data__options": {"broken_from": 2}}, ExitCode.DATA, State.FAILED, "numbers.txt"),
        ({"job__batch_size": 65}, ExitCode.CONFIG, State.FAILED, "job.batch_size"),
        ({"job__entry": "tests.faulty:Fautly"}, ExitCode.CONFIG, State.FAILED, "'Fautly'"),
        ({"job__entry": "tests.absent:Job"}, ExitCode.CONFIG, State.FAILED, "tests.absent"),
        ({"hardware__name": "tpu"}, ExitCode.DEVICE, State.FAILED, "no chip"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_fault_becomes_an_outcome(
    tmp_path: pathlib.Path, changes: dict[str, object], exit_code: int, state: State, reason: str
) -> None:
    result, run_dir = runs.run(tmp_path / "run", **changes)
    assert (result.exit_code, result.state) == (exit_code, state)
    assert reason in result.reason
    assert runs.result_json(run_dir)["reason"] == result.reason


def test_what_came_before_the_end_of_a_worker_is_kept(tmp_path: pathlib.Path) -> None:
    # The clock holds one step and watches another: with the fourth, the first is known to be sent.
    _, run_dir = runs.run(tmp_path / "killed", model__fault="kill", model__at=4)
    assert runs.last_step(run_dir) >= 1
    _, run_dir = runs.run(tmp_path / "raised", model__fault="raise")
    log = run_dir.log.read_text()
    assert "Traceback" in log
    assert "the job's own error" in log


def test_what_the_job_prints_is_shown_and_logged(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, run_dir = runs.run(tmp_path / "run", model__fault="print")
    assert "hello from the job [bold]not markup[/bold]" in run_dir.log.read_text()
    assert "hello from the job [bold]not markup[/bold]" in capfd.readouterr().err


def test_ctrl_c_once_stops_after_the_step(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with runs.parent(run_dir.path, steps=10_000, model__step_s=0.05) as parent:
        runs.wait_for_step(run_dir, 2)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.wait(timeout=60) == ExitCode.INTERRUPTED
        content = runs.result_json(run_dir)
        assert content["state"] == "cancelled"
        assert "interrupted after step" in content["reason"]
        assert content["steps"] >= 2


def test_ctrl_c_twice_stops_now(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with runs.parent(run_dir.path, steps=10_000, model__step_s=300.0) as parent:
        runs.wait_until(lambda: "device" in _environment(run_dir))
        worker = runs.worker_pid(run_dir)
        parent.send_signal(signal.SIGINT)
        assert parent.stdout is not None
        while "Ctrl-C again" not in parent.stdout.readline():
            pass
        parent.send_signal(signal.SIGINT)
        assert parent.wait(timeout=60) == ExitCode.INTERRUPTED
        assert not runs.alive(worker)
        assert runs.result_json(run_dir)["state"] == "cancelled"


def test_sigterm_preempts(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with runs.parent(run_dir.path, steps=10_000, model__step_s=0.05) as parent:
        runs.wait_for_step(run_dir, 2)
        parent.terminate()
        assert parent.wait(timeout=60) == ExitCode.PREEMPTED
        assert runs.result_json(run_dir)["state"] == "preempted"


def test_the_worker_ends_with_its_parent_and_the_folder_is_free(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with runs.parent(run_dir.path, steps=10_000, model__step_s=0.05) as parent:
        runs.wait_for_step(run_dir, 2)
        worker = runs.worker_pid(run_dir)
        parent.kill()
        parent.wait(timeout=60)
        runs.wait_until(lambda: not runs.alive(worker))
        run_dir.lock().release()


def test_a_second_process_on_the_same_folder_is_told_who_has_it(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with runs.parent(run_dir.path, steps=10_000, model__step_s=0.05) as parent:
        runs.wait_for_step(run_dir, 1)
        with pytest.raises(BusyError, match=f"process {parent.pid} on "):
            runs.run(run_dir.path)
        parent.send_signal(signal.SIGINT)
        parent.wait(timeout=60)


def _environment(run_dir: RunDir) -> dict[str, object]:
    try:
        content: dict[str, object] = json.loads(run_dir.environment.read_text())
    except FileNotFoundError:
        return {}
    return content
