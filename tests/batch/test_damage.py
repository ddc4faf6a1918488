"""Damaged checkpoints, full disks and checkpoints that kill: nothing that was saved is lost."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from runner.record.errors import ConfigError, ExitCode
from runner.record.manifest import folder_name
from runner.record.outcome import Result, State
from runner.record.rundir import RunDir
from runner.record.storage import LocalStorage
from runner.train.checkpoint import load
from tests.batch import runs
from tests.batch.test_retries import losses
from tests.train.test_checkpoint import DAMAGES

STEPS = 8
SAVING = {"checkpoint__every_steps": 2, "checkpoint__keep": 3}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that was preempted after step 6, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("six") / "run"
    changes: dict[str, Any] = {"steps": STEPS, **SAVING, "retries__preemptions": 0}
    result, run_dir = runs.run(folder, model__fault="preempt", model__at=6, **changes)
    assert result.exit_code == ExitCode.PREEMPTED
    assert LocalStorage(run_dir.checkpoints).steps() == [6, 4, 2]
    return folder


def go_on(six: pathlib.Path, folder: pathlib.Path, damage: dict[int, Any]) -> Result:
    """Damage a copy of the run and start it again."""
    shutil.copytree(six, folder)
    for step, (file, change) in damage.items():
        change(folder / "checkpoints" / folder_name(step) / file)
    changes: dict[str, Any] = {"steps": STEPS, **SAVING, "retries__preemptions": 0}
    # The fault is further away than this process's steps go.
    result, _ = runs.run(folder, model__fault="preempt", model__at=6, **changes)
    return result


@pytest.mark.parametrize("change", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    six: pathlib.Path,
    tmp_path: pathlib.Path,
    change: Callable[[pathlib.Path], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    result = go_on(six, tmp_path / "run", {6: ("model-00000.safetensors", change)})
    assert result.state is State.SUCCEEDED
    assert result.attempts[-1].first_step == 4
    assert "CORRUPT CHECKPOINT" in capfd.readouterr().err
    aside = tmp_path / "run" / "checkpoints" / "corrupt-step-00000006"
    assert aside.is_dir()
    assert list(losses(RunDir(tmp_path / "run"))) == list(range(1, STEPS + 1))


def test_if_every_checkpoint_is_damaged_the_run_fails_and_stays_failed(
    six: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    manifest = ("manifest.json", pathlib.Path.unlink)
    result = go_on(six, tmp_path / "run", dict.fromkeys((2, 4, 6), manifest))
    assert result.exit_code == ExitCode.CHECKPOINT
    assert "does not start from zero by itself" in result.reason
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {f"corrupt-{folder_name(step)}" for step in (2, 4, 6)}
    again, _ = runs.run(tmp_path / "run", steps=STEPS, **SAVING, model__at=6)
    assert again.exit_code == ExitCode.CHECKPOINT


def test_a_checkpoint_that_kills_twice_makes_way_for_the_one_before(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, memory = tmp_path / "run", str(tmp_path / "memory")
    fault = {"model__fault": "raise", "model__at": 6, "model__times": 3, "model__memory": memory}
    runs.run(folder, steps=30, **SAVING, **fault)
    # From here on nothing is saved, so that each attempt comes back to the same checkpoint.
    result, run_dir = runs.run(folder, steps=30, retries__failures=3, **fault)
    assert result.state is State.SUCCEEDED
    assert [attempt.first_step for attempt in result.attempts] == [0, 4, 4, 2]
    assert "the checkpoint of step 4 was loaded twice and the job died twice" in (
        capfd.readouterr().err
    )
    storage = LocalStorage(run_dir.checkpoints)
    assert sorted(storage.names()) == ["crashed-step-00000004", folder_name(2), folder_name(30)]
    assert list(losses(run_dir)) == list(range(1, 31))


def test_a_run_with_checkpoints_of_another_configuration_is_refused(
    six: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(six, tmp_path / "run")
    changes: dict[str, Any] = {"steps": STEPS, **SAVING, "model__fault": "preempt", "model__at": 6}
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.1 -> 0\.2"):
        runs.run(tmp_path / "run", **changes, retries__preemptions=0, optim__lr=0.2)
    with pytest.raises(ConfigError, match="resume=never needs a folder without checkpoints"):
        runs.run(tmp_path / "run", **changes, resume="never")
    result, _ = runs.run(tmp_path / "run", **{**changes, "steps": 9}, log_every=3)
    assert (result.state, result.steps) == (State.SUCCEEDED, 9)


def test_a_full_disk_stops_neither_training_nor_later_saves(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"steps": 12, "checkpoint__every_steps": 2, "model__step_s": 0.2}
    result, run_dir = runs.run(tmp_path / "run", model__fault="disk", model__at=4, **changes)
    assert result.state is State.SUCCEEDED
    assert len(result.attempts) == 1
    said = capfd.readouterr().err
    assert "the checkpoint of step 4 could not be written" in said
    assert "training goes on, and saving is retried (failure 1 of 3)" in said
    storage = LocalStorage(run_dir.checkpoints)
    assert storage.steps() == [12, 10]
    assert sorted(storage.names()) == [folder_name(10), folder_name(12)]
    load(storage, folder_name(12))


def test_a_disk_that_stays_full_fails_the_run_and_keeps_the_old_checkpoint(
    tmp_path: pathlib.Path,
) -> None:
    changes: dict[str, Any] = {"steps": 500, "checkpoint__every_steps": 2, "model__step_s": 0.05}
    result, run_dir = runs.run(tmp_path / "run", model__fault="full", model__at=4, **changes)
    assert result.exit_code == ExitCode.CHECKPOINT
    assert "failure 3 in a row of the 3 that checkpoint.failures allows" in result.reason
    storage = LocalStorage(run_dir.checkpoints)
    assert storage.names() == [folder_name(2)]
    load(storage, folder_name(2))


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system with room for a few kilobytes."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_without_room_leaves_the_checkpoint_before(
    tmp_path: pathlib.Path, small_disk: pathlib.Path
) -> None:
    # Every checkpoint takes two pages of the disk's three.
    result, run_dir = runs.run(
        tmp_path / "run",
        steps=8,
        checkpoint__every_steps=2,
        checkpoint__failures=2,
        checkpoint__root=str(small_disk),
    )
    assert result.exit_code == ExitCode.CHECKPOINT
    assert "No space left on device" in result.reason
    storage = LocalStorage(small_disk / tmp_path.name / "run")
    assert storage.names() == [folder_name(2)]
    load(storage, folder_name(2))
    assert (run_dir.checkpoints / "elsewhere.txt").read_text().strip() == str(
        small_disk / tmp_path.name / "run"
    )


def test_a_loss_that_arrives_late_is_awaited_before_a_save(tmp_path: pathlib.Path) -> None:
    result, run_dir = runs.run(
        tmp_path / "run",
        backend__name="openxla_step",
        optim__lr=1e9,
        checkpoint__every_steps=1,
        steps=50,
        log_every=50,
    )
    assert result.exit_code == ExitCode.NON_FINITE
    lost = int(result.reason.rpartition("step ")[2].split(",")[0])
    storage = LocalStorage(run_dir.checkpoints)
    assert storage.steps()[0] == lost - 1
    for step in storage.steps():
        _, tensors = load(storage, folder_name(step))
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_loss_that_is_no_number_is_never_saved(tmp_path: pathlib.Path) -> None:
    result, run_dir = runs.run(
        tmp_path / "run", model__fault="nan", model__at=4, checkpoint__every_steps=1, steps=20
    )
    assert result.exit_code == ExitCode.NON_FINITE
    assert len(result.attempts) == 1
    storage = LocalStorage(run_dir.checkpoints)
    assert storage.steps() == [3, 2]
    _, tensors = load(storage, folder_name(3))
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_folder_that_is_removed_under_a_run_ends_it_with_a_word(tmp_path: pathlib.Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    changes: dict[str, Any] = {"steps": 10_000, "model__step_s": 0.05, "retries__failures": 2}
    with runs.parent(run_dir.path, **changes) as parent:
        runs.wait_for_step(run_dir, 2)
        worker = runs.worker_pid(run_dir)
        shutil.rmtree(run_dir.path)
        assert parent.wait(timeout=60) == ExitCode.CHECKPOINT
        assert parent.stdout is not None
        said = parent.stdout.read()
    assert f"the run folder {run_dir.path} was removed while the run was going on" in said
    assert "Traceback" not in said
    assert not runs.alive(worker)
