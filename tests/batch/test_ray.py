"""Batches on a Ray cluster of real raylets on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from runner.batch.cluster import need_of
from runner.batch.fleet import Fleet, Need, connect, disconnect
from runner.config.chips import SLICES
from runner.config.schema import BatchConfig, HardwareConfig, RayConfig
from runner.record.errors import ConfigError
from tests.batch.clusters import cluster, kill_node_of
from tests.batch.runs import alive, started, wait_until
from tests.batch.toys import ROOT

JOBS, STEPS = 12, 20
_JOB = """\
# @package _global_
job: {name: line, entry: "tests.faulty:Faulty", batch_size: 8}
data: {name: numbers, entry: "tests.faulty:numbers", options: {broken_from: null}}
backend: {name: eager}
steps: 20
model: {fault: none, at: 3, step_s: 0.1, times: null, memory: null}
checkpoint: {every_steps: 5}
hardware: {name: cpu}
"""


@contextlib.contextmanager
def batch(folder: pathlib.Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A batch of the job `line`, killed if it is left running."""
    conf = folder / "conf" / "job"
    conf.mkdir(parents=True, exist_ok=True)
    (conf / "line.yaml").write_text(_JOB)
    argv = [sys.executable, "-m", "runner", "--config-dir=conf", "-m", "job=line", *arguments]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "RUNNER_TRUST": "tests", "TERM": "dumb"}
    with started(argv, cwd=folder, environment=known) as process:
        yield process


def run(folder: pathlib.Path, *arguments: str) -> tuple[int, str]:
    """A batch to its end: exit code and output."""
    with batch(folder, *arguments) as process:
        output = process.communicate(timeout=120)[0]
    return process.returncode, output


def read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file that may be missing."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return content


def half_done(folder: pathlib.Path) -> tuple[pathlib.Path, int] | None:
    """A job that runs and has a checkpoint, and its worker's process."""
    for job in sorted(folder.glob("*-line")):
        running = read(job / "result.json").get("state") == "running"
        device = read(job / "env.json").get("device")
        if running and device and list(job.glob("checkpoints/step-*")):
            return job, device["pid"]
    return None


def losses(job: pathlib.Path) -> dict[int, float]:
    """Every step's loss; a step that was made twice must have been the same both times."""
    found: dict[int, float] = {}
    for line in (job / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "train/loss" in values:
            assert found.setdefault(values["step"], values["train/loss"]) == values["train/loss"]
    return found


def test_a_batch_outlives_a_node(tmp_path: pathlib.Path) -> None:
    arguments = (f"seed=range({JOBS})", "batch.name=b", "hydra/launcher=ray")
    with (
        cluster(*[{"num_cpus": 1}] * 3) as made,
        batch(tmp_path, *arguments, f"ray.address={made.address}") as process,
    ):
        folder = tmp_path / "multirun" / "b"
        wait_until(lambda: half_done(folder), limit_s=90)
        found = half_done(folder)
        assert found is not None
        lost, pid = found
        kill_node_of(made, pid)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert f"{JOBS} of {JOBS} jobs succeeded" in output
    assert not alive(pid), "what ran on the lost node is gone"
    first, *_, last = read(lost / "result.json")["attempts"]
    assert "its machine was lost" in first["cause"]
    assert (first["fault"], last["cause"]) == ("preemption", "")
    assert last["first_step"] >= 5, "it went on from a checkpoint"
    assert (lost / "log.txt").read_text().count("on ") >= 2

    code, output = run(tmp_path, f"seed=range({JOBS})", "batch.name=calm", "model.step_s=0")
    assert code == 0, output
    for job in sorted(folder.glob("*-line")):
        assert losses(job) == losses(tmp_path / "multirun" / "calm" / job.name)
        assert len(losses(job)) == STEPS


def test_a_job_of_several_hosts_takes_one_slice_as_a_whole() -> None:
    wanted = Need(cpus=0, chips=4, slice=SLICES["v5e-16"])
    with cluster(*[_host(number) for number in range(4)]) as made:
        connect(made.address)
        fleet = Fleet(wanted, most=2)
        try:
            first = fleet.acquire("a", asked=lambda: False)
            assert first is not None
            assert len(first.names()) == 4
            free = ray.available_resources()
            assert free.get("TPU", 0) == 0
            assert free.get("TPU-v5litepod-16-head", 0) == 0
            assert fleet.acquire("b", asked=_after(2)) is None, "there is no other slice"
            fleet.give_back(first, good=True)
            assert fleet.acquire("a", asked=lambda: False) is first, "kept, with what it compiled"
        finally:
            fleet.close()
            disconnect()


def _host(number: int) -> dict[str, Any]:
    """A host of a slice of 16 chips, as the platform describes it to Ray."""
    labels = {
        "ray.io/tpu-slice-name": "slice-a",
        "ray.io/tpu-worker-id": str(number),
        "ray.io/tpu-topology": "4x4",
        "ray.io/tpu-pod-type": "v5litepod-16",
    }
    head = {"TPU-v5litepod-16-head": 1} if number == 0 else {}
    environment = {"TPU_NAME": "slice-a"}
    return {
        "num_cpus": 1,
        "resources": {"TPU": 4, **head},
        "labels": labels,
        "env_vars": environment,
    }


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.mark.parametrize(
    ("hardware", "settings", "tpu", "need"),
    [
        ("auto", {}, False, Need(cpus=2, chips=0)),
        ("auto", {}, True, Need(cpus=0, chips=1)),
        ("cpu", {}, True, Need(cpus=2, chips=0)),
        ("tpu", {"chips_per_job": 4}, True, Need(cpus=0, chips=4)),
        ("v5e-8", {}, True, Need(cpus=0, chips=8)),
        ("v6e-16", {}, True, Need(cpus=0, chips=4, slice=SLICES["v6e-16"])),
    ],
)
def test_what_a_job_asks_the_cluster_for(
    hardware: str, settings: dict[str, int], tpu: bool, need: Need
) -> None:
    sections = [HardwareConfig(hardware)] * 2
    config = RayConfig(cpus_per_job=2)
    assert need_of(sections, BatchConfig(**settings), config, tpu=tpu) == need


def test_jobs_for_unlike_machines_are_refused() -> None:
    sections = [HardwareConfig("cpu"), HardwareConfig("tpu")]
    with pytest.raises(ConfigError, match="of one kind"):
        need_of(sections, BatchConfig(), RayConfig(), tpu=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hydra/launcher=ray", "ray.address=127.0.0.1:1"], "ray.address must be that of a"),
        (["ray.address=auto"], "ray.* has an effect with hydra/launcher=ray only"),
        (["hydra/launcher=ray", "ray.cpus_per_job=0"], "ray.cpus_per_job must be"),
    ],
)
def test_a_cluster_that_is_not_there_is_told(
    tmp_path: pathlib.Path, arguments: list[str], said: str
) -> None:
    code, output = run(tmp_path, "seed=0,1", "batch.name=b", *arguments)
    assert code == 64, output
    assert said in output
    assert "Traceback" not in output
