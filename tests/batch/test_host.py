"""What a worker on a machine of a cluster is told of the machine."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from runner.batch.host import environment_of
from runner.config.hardware import Machine
from runner.config.hosts import COUNT, INDEX
from runner.config.schema import BatchConfig, HardwareConfig, ParallelConfig
from tests.batch import runs
from tests.config.test_hardware import tpu_vm


@pytest.mark.parametrize(
    ("hardware", "chips_per_job", "place"),
    [
        (HardwareConfig("v5e-16"), None, ("1", "4")),
        (HardwareConfig("v5e-16"), 4, ("0", "1")),
        (HardwareConfig("tpu"), None, ("0", "1")),
        (HardwareConfig("tpu", devices=4), None, ("0", "1")),
    ],
)
def test_only_a_job_of_a_whole_slice_waits_for_its_other_hosts(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    hardware: HardwareConfig,
    chips_per_job: int | None,
    place: tuple[str, str],
) -> None:
    """The cluster may give one host of a slice to a job of its own."""
    machine = tpu_vm(tmp_path, 4)
    monkeypatch.setattr(Machine, "look", lambda: machine)
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    config = dataclasses.replace(
        runs.config(),
        hardware=hardware,
        parallel=ParallelConfig(name="data"),
        batch=BatchConfig(chips_per_job=chips_per_job),
    )
    found = environment_of(config)
    assert (found[INDEX], found[COUNT]) == place
