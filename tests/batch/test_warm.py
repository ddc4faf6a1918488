"""Jobs of one graph share a process: one compile, and the losses of a process of their own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SWEEP = ("seed=0,1", "optim.lr=0.01,0.02", "model.dropout=0.2", "steps=6", "eval_every=3")


def batch(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A batch of the smallest job on the default backend."""
    return subprocess.run(
        [sys.executable, "-m", "runner", "-m", "job=mlp", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def result(folder: pathlib.Path, name: str, job: int) -> dict[str, Any]:
    path = folder / "multirun" / name / f"{job}-mlp" / "result.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def values(folder: pathlib.Path, name: str, job: int) -> list[tuple[int, str, float]]:
    """Every loss, gradient norm and evaluation of a job."""
    path = folder / "multirun" / name / f"{job}-mlp" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    wanted = ("train/loss", "train/grad_norm", "eval/loss", "eval/accuracy")
    return [(line["step"], tag, line[tag]) for line in lines for tag in wanted if tag in line]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("warm")
    done = batch(folder, *SWEEP, "batch.name=warm")
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def process_of(folder: pathlib.Path, name: str, job: int) -> int:
    path = folder / "multirun" / name / f"{job}-mlp" / "env.json"
    pid: int = json.loads(path.read_text())["device"]["pid"]
    return pid


def test_the_step_is_compiled_once_for_all_jobs(warm: pathlib.Path) -> None:
    results = [result(warm, "warm", job) for job in range(4)]
    assert [each["compile"]["count"] for each in results] == [2, 0, 0, 0]
    assert len({process_of(warm, "warm", job) for job in range(4)}) == 1
    for each in results:
        assert [graph["role"] for graph in each["compile"]["graphs"]] == ["step", "eval"]
        assert each["compile"]["recompiles"] == 0
    assert all(each["compile"]["xla_s"] == 0 for each in results[1:])


def test_losses_equal_those_of_a_fresh_process(warm: pathlib.Path) -> None:
    done = batch(warm, *SWEEP, "batch.name=cold", "batch.isolation=process", "seed=1")
    assert done.returncode == 0, done.stderr
    assert len({process_of(warm, "cold", job) for job in range(2)}) == 2
    for alone, shared in ((0, 2), (1, 3)):
        assert values(warm, "cold", alone) == values(warm, "warm", shared)
        assert len(values(warm, "cold", alone)) == 6 * 2 + 2 * 2


def test_what_a_job_printed_is_in_its_own_log(warm: pathlib.Path) -> None:
    folder = warm / "multirun" / "warm"
    logs = [(folder / f"{job}-mlp" / "log.txt").read_text() for job in range(4)]
    assert all("Traceback" not in log for log in logs)


def test_a_failure_retires_the_process(tmp_path: pathlib.Path) -> None:
    done = batch(tmp_path, "optim.lr=0.01,1e30,0.02", "steps=4", "batch.name=b", "log_every=4")
    assert done.returncode == 1
    assert [result(tmp_path, "b", job)["exit_code"] for job in range(3)] == [0, 72, 0]
    pids = [process_of(tmp_path, "b", job) for job in range(3)]
    assert pids[0] == pids[1] != pids[2]
    assert result(tmp_path, "b", 2)["compile"]["count"] == 2
