"""Hardware: what is there, and the environment that a worker needs before torch_xla loads."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from runner.config.chips import ALIASES, CHIPS, SLICES, Chip
from runner.config.mistakes import listed
from runner.config.schema import Config, HardwareConfig, Mode
from runner.record.errors import DeviceError

#: Device files by which a TPU VM shows its chips (v2-v4, and v5e and later).
TPU_DEVICE_FILES = ("dev/accel*", "dev/vfio/[0-9]*")
#: By which the generation shows.
_PCI_DEVICES = "sys/bus/pci/devices/*"
_GOOGLE = "0x1ae0"
#: The slice's name, where the platform tells it (GKE does).
_SLICE_VARIABLE = "TPU_ACCELERATOR_TYPE"
#: One chip for one process. Source: torch_xla 2.9.0, `_internal/tpu.py`.
_ONE_CHIP = {
    "TPU_VISIBLE_CHIPS": "0",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
    "TPU_PROCESS_BOUNDS": "1,1,1",
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The TPU chips that a machine shows, without opening them.

    Attributes:
        chips: How many.
        chip: Their generation's, or None where it does not show.
        slice: Name of the slice that they are a part of, or "" where it is not told.
        looked: What was looked at, for a message.
    """

    chips: int
    chip: Chip | None
    slice: str
    looked: str

    @staticmethod
    def look(
        root: pathlib.Path = pathlib.Path("/"), environment: Mapping[str, str] = os.environ
    ) -> Machine:
        """This machine."""
        chips = [path for pattern in TPU_DEVICE_FILES for path in sorted(root.glob(pattern))]
        told = environment.get(_SLICE_VARIABLE, "")
        name = ALIASES.get(told, told)
        made = SLICES.get(name)
        looked = [str(root / pattern) for pattern in (*TPU_DEVICE_FILES, _PCI_DEVICES)]
        return Machine(
            chips=len(chips),
            chip=_chip_on_bus(root) or (made.chip if made else None),
            slice=name,
            looked=f"{listed(looked)} and {_SLICE_VARIABLE}",
        )


def _chip_on_bus(root: pathlib.Path) -> Chip | None:
    by_id = {chip.pci_id: chip for chip in CHIPS.values()}
    for device in sorted(root.glob(_PCI_DEVICES)):
        try:
            vendor, number = ((device / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:
            continue
        if vendor == _GOOGLE and number in by_id:
            return by_id[number]
    return None


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Hardware that was found.

    Attributes:
        kind: "cpu" or "tpu".
        devices: Devices of this machine that the job uses.
        of: Devices that this machine has.
        hosts: Machines of the slice, where its name tells; else 1.
        chip: What the devices are, or None for the CPU and for chips that nobody knows.
        notice: What the user should be told once, or "".
    """

    kind: str
    devices: int
    of: int = 1
    hosts: int = 1
    chip: Chip | None = None
    notice: str = ""

    @property
    def peak_flops_per_s(self) -> float | None:
        """Peak FLOP/s of one device, or None where it is unknown (a CPU's)."""
        return self.chip.peak_flops_per_s if self.chip else None

    def environment(self) -> dict[str, str]:
        """Variables that must be set before torch_xla is imported."""
        if self.kind == "cpu":
            return {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(self.devices)}
        return {"PJRT_DEVICE": "TPU", **(_ONE_CHIP if self.devices < self.of else {})}


def find_hardware(
    config: HardwareConfig, *, single: bool = False, machine: Machine | None = None
) -> Hardware:
    """The hardware that `hardware=` names.

    Args:
        config: The `hardware` section.
        single: Whether the job uses one device, unless `hardware.devices` says otherwise.
        machine: Where to look; this machine if None.

    Raises:
        DeviceError: A TPU was asked for and there is none, or another one.
    """
    if config.name == "cpu":
        return _cpu(config)
    machine = machine or Machine.look()
    if config.name == "auto" and not machine.chips:
        return _cpu(config, notice="no TPU found; running on the CPU")
    _refuse_absent(config, machine)
    devices = config.devices or (1 if single else machine.chips)
    if devices not in (1, machine.chips):
        raise DeviceError(
            f"hardware.devices must be 1 or {machine.chips}, one chip or all of this machine's: "
            f"chips between are not wired up by themselves; got {devices}"
        )
    told = SLICES.get(config.name) or SLICES.get(machine.slice)
    hosts = told.hosts if told and devices == machine.chips else 1
    return Hardware("tpu", devices, of=machine.chips, hosts=hosts, chip=machine.chip)


def _cpu(config: HardwareConfig, *, notice: str = "") -> Hardware:
    devices = config.devices or 1
    return Hardware("cpu", devices, of=devices, notice=notice)


def hardware_of(config: Config, *, machine: Machine | None = None) -> HardwareConfig:
    """What a job takes of a machine: the chips stated where `parallel=` tells and it does not.

    A preflight takes none: the compiler needs no chip.
    """
    hardware = config.hardware
    if config.mode is Mode.preflight:
        return HardwareConfig(name="cpu")
    if config.parallel.name == "single" or hardware.devices or hardware.name == "cpu":
        return hardware
    machine = machine or Machine.look()
    return dataclasses.replace(hardware, devices=machine.chips) if machine.chips else hardware


def _refuse_absent(config: HardwareConfig, machine: Machine) -> None:
    if not machine.chips:
        raise DeviceError(
            f"hardware={config.name} needs a TPU, but this machine has no chip: "
            f"looked for {machine.looked}; use hardware=cpu to run without one, or "
            "mode=preflight to ask the TPU compiler"
        )
    wanted = SLICES.get(config.name)
    if wanted is None:
        return
    if machine.chip is not None and machine.chip != wanted.chip:
        raise DeviceError(
            f"hardware={config.name} needs {wanted.chip.generation} chips; this machine has "
            f"{machine.chips} of {machine.chip.generation}: use hardware=tpu for what is here"
        )
    if machine.chips != wanted.chips_per_host:
        raise DeviceError(
            f"hardware={config.name} has {wanted.chips_per_host} chips a machine; this machine "
            f"has {machine.chips}: use hardware=tpu for what is here"
        )
