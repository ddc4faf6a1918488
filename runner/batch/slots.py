"""Slots: parts of this machine that hold one job at a time.

On a TPU a slot is a set of chips, on the CPU a set of cores. What a slot's process must have
in its environment before torch_xla loads is said here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from runner.config.hardware import Machine, find_hardware
from runner.config.schema import BatchConfig, HardwareConfig
from runner.record.errors import ConfigError

#: How many chips make which box. Source: torch_xla, Ray and torch_tpu agree for 1; JAX's
#: `cloud_tpu_init` and Ray for 2 and 4; 8 is a whole host of v5e or v6e.
_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A part of the machine.

    Attributes:
        number: From 0.
        environment: Variables of its processes.
        cores: The processor cores that its processes may use; None for all.
        name: What it is, for people.
    """

    number: int
    environment: Mapping[str, str]
    cores: tuple[int, ...] | None
    name: str


def plan_slots(
    hardware: Sequence[HardwareConfig], batch: BatchConfig, *, machine: Machine | None = None
) -> list[Slot]:
    """The slots for jobs with these `hardware` sections.

    Args:
        hardware: The sections.
        batch: The `batch` section.
        machine: What to share; this machine if None.

    Raises:
        DeviceError: A job needs a TPU that is not there.
        ConfigError: The chips cannot be shared as asked.
    """
    machine = machine or Machine.look()
    distinct = list(dict.fromkeys(hardware))
    found = [find_hardware(config, single=True, machine=machine) for config in distinct]
    if not any(each.kind == "tpu" for each in found):
        return _cpu_slots(batch)
    asked = max((config.devices or 1 for config in distinct), default=1)
    return tpu_slots(machine.chips, batch.chips_per_job or asked, most=batch.max_concurrent)


def tpu_slots(chips: int, chips_per_job: int, *, most: int | None) -> list[Slot]:
    """Slots of `chips_per_job` chips each, on a host with `chips` of them.

    Raises:
        ConfigError: No such part of a host can be given to a process.
    """
    if chips_per_job > chips or (chips_per_job != chips and chips_per_job not in _BOUNDS):
        sizes = [str(size) for size in _BOUNDS if size < chips] + [str(chips)]
        raise ConfigError(
            f"batch.chips_per_job must be one of {', '.join(sizes)}, the parts of this host's "
            f"{chips} chips that libtpu can give to a process; got {chips_per_job}"
        )
    count = chips // chips_per_job
    if most is not None:
        count = min(count, most)
    return [_tpu_slot(number, chips, chips_per_job) for number in range(count)]


def _tpu_slot(number: int, chips: int, chips_per_job: int) -> Slot:
    if chips_per_job == chips:
        return Slot(number, {}, None, f"all {chips} chips")
    first = number * chips_per_job
    visible = ",".join(str(chip) for chip in range(first, first + chips_per_job))
    return Slot(number, chip_environment(visible), None, f"chip {visible}")


def chip_environment(visible: str) -> dict[str, str]:
    """Variables of a process that has some of a host's chips: their numbers, as "2,3"."""
    return {
        "TPU_VISIBLE_CHIPS": visible,
        "TPU_CHIPS_PER_PROCESS_BOUNDS": _BOUNDS[len(visible.split(","))],
        "TPU_PROCESS_BOUNDS": "1,1,1",
        # libtpu's lock is for the host; the chips of two slots are never the same.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _cpu_slots(batch: BatchConfig) -> list[Slot]:
    if batch.chips_per_job is not None:
        raise ConfigError(
            "batch.chips_per_job must be null on the CPU: it has no chips; jobs share its cores "
            f"by batch.max_concurrent; got {batch.chips_per_job}"
        )
    count = batch.max_concurrent or 1
    cores = sorted(os.sched_getaffinity(0))
    if count == 1:
        return [Slot(0, {}, None, f"{len(cores)} cores")]
    return [_cpu_slot(number, count, cores) for number in range(count)]


def _cpu_slot(number: int, count: int, cores: list[int]) -> Slot:
    """The slot's share of the cores; more slots than cores share them all."""
    if count > len(cores):
        return Slot(number, {"OMP_NUM_THREADS": "1"}, None, "a share of all cores")
    share = tuple(cores[number::count])
    listed = ",".join(str(core) for core in share)
    return Slot(number, {"OMP_NUM_THREADS": str(len(share))}, share, f"core {listed}")
