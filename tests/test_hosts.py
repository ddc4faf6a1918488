"""Jobs of several hosts, from the command on each to one run folder: see `tests.pod`."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import psutil
import pytest

ROOT = pathlib.Path(__file__).parents[1]
HOSTS = 2

JOB = """
from jobs.mlp import MLP as Mine
from tests import pod

pod.play()
"""
BROKEN = """
import os
from jobs.base import DataError
from jobs.images import digits

def data(request):
    if os.environ["RUNNER_HOST_INDEX"] == "1":
        raise DataError("no such file here")
    return digits(request)
"""
SETTINGS = (
    "job=mlp",
    "job.entry=mine:Mine",
    "model.width=64",
    "hardware=cpu",
    "hardware.devices=4",
    "parallel=fsdp",
    "job.batch_size=16",
    "job.eval_batch_size=100",
    "steps=40",
    "log_every=1",
    "hydra.run.dir=run",
    "retries.backoff_s=0",
    "schedule=constant",
    "schedule.warmup_fraction=0",  # the same rates whatever `steps` is
    "data.options.image_size=28",  # as large as they are: one crop, at whatever host
)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


class Pod:
    """The same command on every host; the hosts that still run at the end are killed.

    Args:
        folder: Where it is started.
        command: The command's arguments.
        own: Further ones, by host.
        trust: Packages that the command trusts.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        command: tuple[str, ...] = SETTINGS,
        *,
        own: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
        trust: str = "mine",
    ) -> None:
        (folder / "mine.py").write_text(JOB)
        self._folder, self._command, self._own = folder, command, own
        self._environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{folder}",
            "RUNNER_TRUST": trust,
            "GLOO_SOCKET_IFNAME": "lo",
            "RUNNER_HOST_COUNT": str(HOSTS),
            "RUNNER_COORDINATOR": f"127.0.0.1:{free_port()}",
        }
        self._running: dict[int, subprocess.Popen[str]] = {}

    def __enter__(self) -> Pod:
        return self

    def __exit__(self, *error: object) -> None:
        for host in self._running.values():
            host.kill()
            host.communicate()

    def start(self, *indices: int) -> Pod:
        """Start the command on these hosts."""
        for index in indices:
            self._running[index] = subprocess.Popen(
                [sys.executable, "-m", "runner", *self._command, *self._own.get(index, ())],
                cwd=self._folder,
                env={**self._environment, "RUNNER_HOST_INDEX": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        return self

    def preempt(self, index: int) -> None:
        """Ask a host to save and end, as a cloud does."""
        self._running[index].send_signal(signal.SIGTERM)

    def kill_worker(self, index: int) -> None:
        """Kill the process that trains on a host."""
        psutil.Process(self._running[index].pid).children()[0].kill()

    def ended(self, index: int) -> tuple[int, str]:
        """Exit code and output of a host, once it has ended."""
        host = self._running[index]
        said = host.communicate(timeout=100)[0]
        return host.returncode, said

    def all_ended(self) -> tuple[list[int], list[str]]:
        """Exit codes and outputs."""
        codes, said = zip(*(self.ended(index) for index in sorted(self._running)), strict=True)
        return list(codes), list(said)


def losses(run: pathlib.Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def result(run: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def wait_for_step(run: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < step:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def trained_alone(folder: pathlib.Path, *overrides: str) -> list[float]:
    """The losses of one host that has all the devices."""
    (folder / "mine.py").write_text(JOB)
    done = subprocess.run(
        [sys.executable, "-m", "runner", *SETTINGS, *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "RUNNER_TRUST": "mine"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return losses(folder / "run")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses that every test must have."""
    return trained_alone(tmp_path_factory.mktemp("alone"))


def test_two_hosts_are_one_run(tmp_path: pathlib.Path, alone: list[float]) -> None:
    """One folder, written by the first; the checkpoint in parts of both; losses of one host."""
    with Pod(tmp_path).start(0, 1) as pod:
        codes, said = pod.all_ended()
    assert codes == [0, 0], said
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"mine.py", "run"}
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-6)
    assert "host 1 of 2: succeeded after 40 steps" in said[1]
    assert "tensorboard" not in said[1]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model-00000.safetensors", "model-1-00000.safetensors", "manifest.json"} <= names


def test_lazy_and_data_parallel_do_it_too(tmp_path: pathlib.Path, alone: list[float]) -> None:
    """Where every device has all of the state, the first host saves it."""
    command = (*SETTINGS, "backend=lazy", "parallel=data", "steps=10")
    with Pod(tmp_path, command).start(0, 1) as pod:
        codes, said = pod.all_ended()
    assert codes == [0, 0], said
    assert losses(tmp_path / "run") == pytest.approx(alone[:10], rel=1e-5)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert not list(checkpoint.glob("*-1-*"))


def test_a_preempted_host_stops_all_after_one_step_and_is_waited_for(
    tmp_path: pathlib.Path, alone: list[float]
) -> None:
    with Pod(tmp_path).start(0, 1) as pod:
        wait_for_step(tmp_path / "run", 5)
        pod.preempt(1)
        code, told = pod.ended(1)
        assert code == 75, told
        codes, said = pod.start(1).all_ended()
    assert codes == [0, 0], said
    first, second = result(tmp_path / "run")["attempts"]
    assert first["exit_code"] == 75
    assert first["saved_step"] == first["steps"] == second["first_step"] >= 5
    assert losses(tmp_path / "run") == alone


def test_a_host_whose_worker_is_killed_takes_all_back_to_the_checkpoint(
    tmp_path: pathlib.Path, alone: list[float]
) -> None:
    saving = (*SETTINGS, "checkpoint.every_steps=5", "retries.failures=1")
    with Pod(tmp_path, saving).start(0, 1) as pod:
        wait_for_step(tmp_path / "run", 12)
        pod.kill_worker(1)
        codes, said = pod.all_ended()
    assert codes == [0, 0], said
    attempts = result(tmp_path / "run")["attempts"]
    assert [attempt["cause"] for attempt in attempts] == ["host 1 was lost", ""]
    assert attempts[1]["first_step"] in (5, 10)
    assert losses(tmp_path / "run") == alone


def test_what_ends_one_host_ends_the_others_with_its_reason(tmp_path: pathlib.Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    command = (*SETTINGS, "data.entry=broken:data")
    with Pod(tmp_path, command, trust="mine,broken").start(0, 1) as pod:
        codes, said = pod.all_ended()
    assert codes == [65, 65], said
    assert "host 1: no such file here" in said[0]
    assert result(tmp_path / "run")["reason"] == "host 1: no such file here"


def test_hosts_with_different_configurations_are_told(tmp_path: pathlib.Path) -> None:
    with Pod(tmp_path, own={1: ("optim.lr=0.5",)}).start(0, 1) as pod:
        codes, said = pod.all_ended()
    assert codes == [64, 64]
    for each in said:
        assert "host 1 has another configuration than host 0" in each
        assert "optim.lr: " in each


def test_a_host_that_does_not_come_is_named(tmp_path: pathlib.Path) -> None:
    command = (*SETTINGS, "timeouts.hosts_s=2", "retries.infrastructure=0")
    with Pod(tmp_path, command).start(0) as pod:
        code, said = pod.ended(0)
    assert code == 71, said
    assert "waiting for host 1 of 2" in said
    assert "host 1 of 2 has not come in time (timeouts.hosts_s)" in said


def test_a_checkpoint_goes_on_with_other_hosts_and_devices(
    tmp_path: pathlib.Path, alone: list[float]
) -> None:
    """A pod's checkpoint is one of the job: one host with other devices goes on with it."""
    with Pod(tmp_path, (*SETTINGS, "steps=20")).start(0, 1) as pod:
        assert pod.all_ended()[0] == [0, 0]
    found = trained_alone(tmp_path, "hardware.devices=2")
    assert len(found) == 40
    assert found == pytest.approx(alone, rel=1e-5)


def test_a_batch_of_jobs_of_several_hosts_is_rays(tmp_path: pathlib.Path) -> None:
    command = ("-m", *(line for line in SETTINGS if not line.startswith("hydra")), "seed=1,2")
    with Pod(tmp_path, command).start(0, 1) as pod:
        codes, said = pod.all_ended()
    assert codes == [64, 64]
    assert "-m must have hydra/launcher=ray" in said[0]


def test_a_job_of_one_chip_waits_for_nobody(tmp_path: pathlib.Path) -> None:
    """Each host then has a job of its own, in the folder that it names."""
    command = (*SETTINGS, "parallel=single", "hardware.devices=1", "steps=2", "hydra.run.dir=run-1")
    with Pod(tmp_path, command).start(1) as pod:
        code, said = pod.ended(1)
    assert code == 0, said
    assert len(losses(tmp_path / "run-1")) == 2
