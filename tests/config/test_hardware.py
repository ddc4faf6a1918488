"""Slices by the names that users know; what a machine shows of its chips; what is refused."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from runner.config.chips import ALIASES, CHIPS, SLICES
from runner.config.hardware import Hardware, Machine, find_hardware, hardware_of
from runner.config.schema import HardwareConfig, Mode, ParallelConfig
from runner.record.errors import DeviceError
from tests.config.user_conf import composer, write_conf


def tpu_vm(root: pathlib.Path, chips: int, pci_id: str = "0x0063", **variables: str) -> Machine:
    """A machine whose files look like those of a TPU VM."""
    (root / "dev/vfio").mkdir(parents=True)
    (root / "dev/vfio/vfio").touch()
    for number in range(chips):
        (root / f"dev/vfio/{number}").touch()
        bus = root / f"sys/bus/pci/devices/0000:00:0{number}.0"
        bus.mkdir(parents=True)
        (bus / "vendor").write_text("0x1ae0\n")
        (bus / "device").write_text(f"{pci_id}\n")
    return Machine.look(root, variables)


NAMED = [
    ("v4-8", 4, 1, "v4:2x2x1"),
    ("v4-32", 16, 4, "v4:2x2x4"),
    ("v5e-1", 1, 1, "v5e:1x1"),
    ("v5e-4", 4, 1, "v5e:2x2"),
    ("v5e-8", 8, 1, "v5e:2x4"),
    ("v5e-16", 16, 4, "v5e:4x4"),
    ("v5p-8", 4, 1, "v5p:2x2x1"),
    ("v5p-12288", 6144, 1536, "v5p:16x16x24"),
    ("v6e-64", 64, 16, "v6e:8x8"),
    ("v6e-256", 256, 64, "v6e:16x16"),
]


@pytest.mark.parametrize(("name", "chips", "hosts", "topology"), NAMED)
def test_a_slice_is_what_its_name_says(name: str, chips: int, hosts: int, topology: str) -> None:
    made = SLICES[name]
    assert (made.chips, made.hosts, made.topology) == (chips, hosts, topology)
    assert made.chips == made.hosts * made.chips_per_host


def test_a_name_counts_cores_where_a_chip_has_two() -> None:
    for name, made in SLICES.items():
        assert name == f"{made.chip.generation}-{made.chips * made.chip.cores}"


def test_a_peak_is_that_of_the_matrix_units_at_the_chips_clock() -> None:
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    for generation, chip in CHIPS.items():
        assert chip.peak_flops_per_s == pytest.approx(
            2 * units[generation] * chip.clock_hz, rel=0.01
        )
        assert chip.usable_hbm_bytes < chip.hbm_bytes * 1.01


def test_every_slice_can_be_asked_for_by_each_of_its_names(tmp_path: pathlib.Path) -> None:
    mine = composer(write_conf(tmp_path))
    assert mine.config(["job=mine", "hardware=v6e-64"]).hardware.name == "v6e-64"
    assert mine.config(["job=mine", "hardware=v5litepod-16"]).hardware.name == "v5e-16"
    assert set(SLICES) | set(ALIASES) <= set(mine.options("hardware"))


def test_without_chips_auto_is_the_cpu_and_says_so(tmp_path: pathlib.Path) -> None:
    bare = Machine.look(tmp_path, {})
    found = find_hardware(HardwareConfig("auto"), machine=bare)
    assert (found.kind, found.devices) == ("cpu", 1)
    assert "no TPU found" in found.notice
    assert find_hardware(HardwareConfig("cpu"), machine=bare).notice == ""


def test_cpu_devices_are_made_by_an_environment_variable(tmp_path: pathlib.Path) -> None:
    found = find_hardware(HardwareConfig("cpu", devices=8), machine=Machine.look(tmp_path, {}))
    assert found.environment() == {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}
    assert found.peak_flops_per_s is None


@pytest.mark.parametrize("name", ["tpu", "v5e-8"])
def test_a_tpu_that_is_not_there_is_an_error_that_says_what_was_looked_for(
    tmp_path: pathlib.Path, name: str
) -> None:
    with pytest.raises(DeviceError, match=rf"hardware={name} needs a TPU.*looked for .*accel\*"):
        find_hardware(HardwareConfig(name), machine=Machine.look(tmp_path, {}))


def test_chips_are_found_and_known_by_their_number_on_the_bus(tmp_path: pathlib.Path) -> None:
    found = find_hardware(HardwareConfig("auto"), machine=tpu_vm(tmp_path, 8))
    assert found == Hardware("tpu", 8, of=8, chip=CHIPS["v5e"])
    assert found.peak_flops_per_s == 197e12
    assert found.environment() == {"PJRT_DEVICE": "TPU"}


def test_one_chip_of_several_is_made_visible_alone(tmp_path: pathlib.Path) -> None:
    machine = tpu_vm(tmp_path, 4)
    alone = find_hardware(HardwareConfig("tpu"), single=True, machine=machine)
    assert alone.devices == 1
    assert alone.environment()["TPU_VISIBLE_CHIPS"] == "0"
    assert alone == find_hardware(HardwareConfig("tpu", devices=1), machine=machine)


def test_the_hosts_of_a_slice_are_known_by_its_name(tmp_path: pathlib.Path) -> None:
    machine = tpu_vm(tmp_path, 4, TPU_ACCELERATOR_TYPE="v5litepod-16")
    assert find_hardware(HardwareConfig("auto"), machine=machine).hosts == 4
    assert find_hardware(HardwareConfig("v5e-16"), machine=machine).hosts == 4
    assert find_hardware(HardwareConfig("auto", devices=1), machine=machine).hosts == 1


def test_a_mesh_takes_all_chips_that_nobody_counted_and_a_preflight_none(
    tmp_path: pathlib.Path,
) -> None:
    machine = tpu_vm(tmp_path, 4)
    single = composer(write_conf(tmp_path / "conf")).config(["job=mine"])
    single = dataclasses.replace(single, hardware=HardwareConfig("tpu"))
    data = dataclasses.replace(single, parallel=ParallelConfig(name="data"))
    two = dataclasses.replace(data, hardware=HardwareConfig("tpu", devices=2))
    preflight = dataclasses.replace(data, mode=Mode.preflight)
    assert hardware_of(single, machine=machine) == single.hardware
    assert hardware_of(data, machine=machine) == HardwareConfig("tpu", devices=4)
    assert hardware_of(two, machine=machine) == two.hardware
    assert hardware_of(preflight, machine=machine) == HardwareConfig("cpu")


REFUSED = [
    (HardwareConfig("v6e-8"), "needs v6e chips; this machine has 4 of v5e"),
    (HardwareConfig("v5e-8"), "has 8 chips a machine; this machine has 4"),
    (HardwareConfig("tpu", devices=3), "hardware.devices must be 1 or 4"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_another_tpu_than_the_one_asked_for_is_refused(
    tmp_path: pathlib.Path, asked: HardwareConfig, message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        find_hardware(asked, machine=tpu_vm(tmp_path, 4))
