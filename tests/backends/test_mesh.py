"""The same jobs on 1, 2, 4 and 8 devices: losses, programs, compiles, bytes on each device.

Each number of devices runs in a process of its own, `mesh_child`, which trains every case.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from tests.backends.mesh_child import BATCHES, STEPS

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = (2, 4, 8)
JOBS = ("resnet", "gpt")
WAYS = ("data", "fsdp")
# The first test on a number of devices waits for its child.
pytestmark = pytest.mark.timeout(900)
over_meshes = pytest.mark.parametrize("devices", DEVICES)
each_job = pytest.mark.parametrize("job", JOBS)
each_way = pytest.mark.parametrize("way", WAYS)


@functools.cache
def trained(devices: int) -> dict[str, Any]:
    """What the child of so many devices saw, by case."""
    with tempfile.TemporaryDirectory() as folder:
        found = pathlib.Path(folder, "cases.json")
        done = subprocess.run(
            [sys.executable, "-m", "tests.backends.mesh_child", str(devices), str(found)],
            cwd=ROOT,
            env={**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        cases: dict[str, Any] = json.loads(found.read_text())
    return cases


def losses(job: str, way: str, devices: int) -> list[float]:
    found: list[float] = trained(devices)[f"{job} {way}"]["losses"]
    return found


@each_job
def test_losses_on_one_device_fall(job: str) -> None:
    """Else equal losses would say nothing of gradients and updates."""
    found = losses(job, "data", 1)
    falls = [first - last for first, last in zip(found[:BATCHES], found[-BATCHES:], strict=True)]
    assert min(falls) > 100 * 1e-5 * found[0]


@each_way
@each_job
@over_meshes
def test_losses_equal_those_of_one_device(devices: int, job: str, way: str) -> None:
    assert losses(job, way, devices) == pytest.approx(losses(job, "data", 1), rel=1e-5)


@each_way
@over_meshes
def test_batch_norms_have_the_statistics_of_the_whole_batch(devices: int, way: str) -> None:
    alone, spread = (
        trained(n)[f"resnet {w}"]["statistics"] for n, w in ((1, "data"), (devices, way))
    )
    assert len(alone) == 15
    assert spread == pytest.approx(alone, rel=1e-5)


@over_meshes
def test_layers_computed_again_give_the_losses_of_one_device_that_keeps_them(devices: int) -> None:
    again = trained(devices)["gpt-remat fsdp"]
    assert again["losses"] == pytest.approx(losses("gpt", "data", 1), rel=1e-5)
    assert set(again["programs"][1:]) == {1}


@pytest.mark.parametrize("case", ["gpt-scanned", "gpt-lazy"])
@each_way
@over_meshes
def test_layers_in_a_loop_and_lazy_tensors_do_the_same(devices: int, way: str, case: str) -> None:
    found = trained(devices)[f"{case} {way}"]
    assert found["losses"] == pytest.approx(losses("gpt", "data", 1), rel=1e-5)
    assert set(found["programs"][1:]) == {1}
    assert set(found["compiles"]) == {found["compiles"][0]}
    share = found["divisible"] // (devices if way == "fsdp" else 1)
    assert found["held"] == [share] * devices


@pytest.mark.parametrize("case", ["resnet", "gpt", "gpt-scanned", "gpt-lazy"])
@each_way
@over_meshes
def test_a_state_that_comes_back_goes_on_without_a_compile(
    devices: int, way: str, case: str
) -> None:
    loss, compiles = trained(devices)[f"{case} {way}"]["resumed"]
    alone, _ = trained(1)[f"{case} data"]["resumed"]
    assert loss == pytest.approx(alone, rel=1e-5)
    assert compiles == 0


@each_way
@each_job
@over_meshes
def test_a_step_is_one_program_compiled_once(devices: int, job: str, way: str) -> None:
    case = trained(devices)[f"{job} {way}"]
    assert case["graphs"] == ["step"]
    assert set(case["compiles"]) == {case["compiles"][0]}
    assert case["programs"][1:] == [1] * (STEPS - 1)


@each_job
@over_meshes
def test_fsdp_leaves_each_device_its_share_and_no_more(devices: int, job: str) -> None:
    case = trained(devices)[f"{job} fsdp"]
    assert case["divisible"] > 0
    assert case["held"] == [case["divisible"] // devices] * devices


@each_job
@over_meshes
def test_data_parallel_devices_hold_all_of_the_state(devices: int, job: str) -> None:
    case = trained(devices)[f"{job} data"]
    assert case["held"] == [case["divisible"]] * devices
