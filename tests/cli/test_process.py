"""The command line at its process's boundary: exit codes, streams, no traceback, no torch."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.config.user_conf import JOB, write_conf

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_conf(tmp_path_factory.mktemp("user") / "conf")


def _runner(
    cwd: pathlib.Path, *argv: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner", *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


WRONG = [
    (["job=mien"], "'mine'"),
    (["job=mine", "model.depth=abc"], "whole number"),
    (["job=mine", "--nope"], "--nope"),
    (["job=mine", "--config-dir", "nowhere"], "nowhere"),
    (["--cfg", "job", "job=mine", "+steqs=3"], "'steps'"),
    (["--cfg", "job"], "job must be given"),
    (["-sc", "install=bsh"], "bash"),
    (["-m", "job=mine", "seed=0,x"], "job 1 of 0 to 1: seed must be a whole number"),
]


@pytest.mark.parametrize(("argv", "said"), WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_a_mistake_ends_with_64_and_one_message(
    tmp_path: pathlib.Path, conf: pathlib.Path, argv: list[str], said: str
) -> None:
    given = argv if "--config-dir" in argv else ["--config-dir", str(conf), *argv]
    done = _runner(tmp_path, *given)
    assert done.returncode == 64, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("runner: ")
    assert list(tmp_path.iterdir()) == [], "nothing was started"


def test_alone_it_lists_the_jobs_and_how_to_start_one(
    tmp_path: pathlib.Path, conf: pathlib.Path
) -> None:
    done = _runner(tmp_path, "--config-dir", str(conf))
    assert done.returncode == 64
    assert "mine" in done.stdout
    assert "A job of the tests" in done.stdout
    assert "python -m runner job=" in done.stdout
    assert "job must be given" in done.stderr


SHOWN = [
    (["--help"], ["A job of the tests", "optim: ", "Examples:", "-sc install=bash"]),
    (["--hydra-help"], ["--shell-completion"]),
    (["--version"], ["runner ", "hydra-core 1.3"]),
    (["--cfg", "job", "job=mine"], ["depth: 18", "lr: 0.05"]),
    (["--info", "searchpath"], ["command-line"]),
    (["-sc", "install=bash"], ["complete"]),
]


@pytest.mark.parametrize(("argv", "said"), SHOWN, ids=[" ".join(argv) for argv, _ in SHOWN])
def test_what_only_shows_ends_with_zero(
    tmp_path: pathlib.Path, conf: pathlib.Path, argv: list[str], said: list[str]
) -> None:
    done = _runner(tmp_path, "--config-dir", str(conf), *argv)
    assert (done.returncode, done.stderr) == (0, "")
    for part in said:
        assert part in done.stdout


@pytest.mark.parametrize("argv", [["--help"], ["job=mine", "steps=0"]])
def test_torch_is_not_imported(tmp_path: pathlib.Path, conf: pathlib.Path, argv: list[str]) -> None:
    program = (
        "import sys; from runner.__main__ import main; main(); "
        "sys.exit([name for name in sys.modules if name.split('.')[0] in ('torch', 'torch_xla')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--config-dir", str(conf), *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "[]" in done.stderr
    assert "torch'" not in done.stderr


def test_a_closed_pipe_is_quiet(tmp_path: pathlib.Path, conf: pathlib.Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "runner", "--help"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_the_full_error_is_shown_on_request(tmp_path: pathlib.Path) -> None:
    done = _runner(tmp_path, "job=nope", env={"HYDRA_FULL_ERROR": "1"})
    assert done.returncode == 64
    assert "Traceback" in done.stderr
    assert "runner: job=nope" in done.stderr


def test_a_user_adds_a_job_without_touching_the_runner(tmp_path: pathlib.Path) -> None:
    write_conf(tmp_path / "my_conf", job=JOB.replace("jobs.mlp:Mlp", "my_jobs.net:Net"))
    argv = ("--config-dir", "my_conf", "job=mine", "--cfg", "job")
    refused = _runner(tmp_path, *argv)
    assert refused.returncode == 64
    assert "export RUNNER_TRUST=my_jobs" in refused.stderr
    trusted = _runner(tmp_path, *argv, env={"RUNNER_TRUST": "my_jobs"})
    assert (trusted.returncode, trusted.stderr) == (0, "")
    assert "entry: my_jobs.net:Net" in trusted.stdout
