"""What becomes of runs, as Hydra hands them over: rows, exit codes, interruption.

The child process is left out: `supervise` is a function of the test's own.
"""

from __future__ import annotations

import pathlib
import sys

import pytest

from runner.cli import app
from runner.cli.arguments import parse
from runner.cli.runs import Asked
from runner.record.errors import DataError, ExitCode
from runner.record.outcome import Result, state_of
from tests.config.user_conf import write_conf

#: A batch under Hydra's own launcher, which hands the runs over one by one.
STOCK = ("-m", "hydra/launcher=basic")


@pytest.fixture(autouse=True)
def workplace(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    return write_conf(tmp_path / "conf")


class Supervisor:
    """Ends each run as its seed says."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def __call__(self, asked: Asked) -> Result:
        self.asked.append(asked)
        if asked.config.seed == 1:
            raise DataError("no file x")
        if asked.config.seed == 2:
            raise RuntimeError("a bug")
        code = {3: ExitCode.INTERRUPTED, 4: ExitCode.HANG}.get(asked.config.seed, ExitCode.DONE)
        return Result(
            job=asked.config.job.name,
            backend=asked.config.backend.name,
            state=state_of(code),
            exit_code=code,
            reason="" if code == ExitCode.DONE else "as asked",
            final={"accuracy": 0.987654},
        )


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    made = Supervisor()
    monkeypatch.setattr(app, "_supervise", made)
    return made


def _main(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["runner", "--config-dir", "conf", *argv])
    return app.main()


def test_a_run_gets_its_folder_and_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, supervisor: Supervisor, tmp_path: pathlib.Path
) -> None:
    assert _main(monkeypatch, "job=mine", "steps=5") == 0
    (asked,) = supervisor.asked
    assert asked.folder.path.parent == tmp_path / "outputs" / "mine"
    assert asked.tensorboard_root == asked.folder.path
    assert asked.overrides == ["job=mine", "steps=5"]
    assert asked.config.steps == 5
    assert "steps: 5" in asked.config_yaml
    assert not (asked.folder.path / ".hydra").exists()


@pytest.mark.parametrize(("seed", "code"), [(0, 0), (1, 65), (2, 70), (3, 130), (4, 74)])
def test_a_single_run_ends_with_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, supervisor: Supervisor, seed: int, code: int
) -> None:
    assert _main(monkeypatch, "job=mine", f"seed={seed}") == code


def test_one_failure_does_not_end_a_batch(
    monkeypatch: pytest.MonkeyPatch, supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, *STOCK, "job=mine", "seed=1,2,4,0") == 1
    assert [asked.config.seed for asked in supervisor.asked] == [1, 2, 4, 0]
    out = capsys.readouterr().out
    assert "no file x" in out
    assert "RuntimeError: a bug" in out
    assert "timed_out" in out
    assert "accuracy=0.9877" in out
    assert "1 of 4 jobs succeeded" in out
    roots = {asked.tensorboard_root for asked in supervisor.asked}
    assert len(roots) == 1
    assert f"tensorboard --logdir {roots.pop()}" in out
    folders = [asked.folder.path.name for asked in supervisor.asked]
    assert folders == ["0-mine", "1-mine", "2-mine", "3-mine"]


def test_a_batch_that_succeeds_ends_with_zero(
    monkeypatch: pytest.MonkeyPatch, supervisor: Supervisor
) -> None:
    assert _main(monkeypatch, *STOCK, "job=mine", "seed=0", "optim.lr=0.1,0.2") == 0
    assert [asked.config.optim.lr for asked in supervisor.asked] == [0.1, 0.2]


def test_an_interruption_ends_the_batch(
    monkeypatch: pytest.MonkeyPatch, supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, *STOCK, "job=mine", "seed=0,3,5") == 130
    assert [asked.config.seed for asked in supervisor.asked] == [0, 3]
    assert "1 of 2 jobs succeeded" in capsys.readouterr().out


def test_a_batch_with_one_wrong_job_starts_none(
    monkeypatch: pytest.MonkeyPatch,
    supervisor: Supervisor,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
) -> None:
    assert _main(monkeypatch, *STOCK, "job=mine", "seed=0,1", "optim.lr=0.1,-1") == 64
    assert supervisor.asked == []
    assert not (tmp_path / "multirun").exists()
    assert "job 1 of 0 to 3: optim.lr" in capsys.readouterr().err


def test_a_sweep_over_every_job_is_expanded_beforehand(
    monkeypatch: pytest.MonkeyPatch, supervisor: Supervisor
) -> None:
    assert _main(monkeypatch, *STOCK, "job=glob(mi*)", "seed=range(5,7)") == 0
    assert [asked.config.seed for asked in supervisor.asked] == [5, 6]


@pytest.mark.parametrize("flag", ["--experimental-rerun=x", "--config-name=x", "--config-path=x"])
def test_flags_that_leave_the_fixed_configuration_are_refused(
    monkeypatch: pytest.MonkeyPatch, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "job=mine", flag) == 64
    assert "must not be given" in capsys.readouterr().err


def test_flags_and_overrides_may_stand_in_any_order() -> None:
    asked = parse(["job=a", "--cfg", "job", "seed=1"])
    assert asked.overrides == ("job=a", "seed=1")
    assert (asked.shows, asked.cfg) == ("cfg", "job")
