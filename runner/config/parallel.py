"""The mesh of devices that `parallel=` describes, and the sizes that must divide by it.

Plain numbers and names: the parent, the child and preflight read the same mesh from the same
configuration. How a tensor lies on it is `runner.backends.sharding`'s to say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from runner.config import names
from runner.config.chips import SLICES
from runner.config.mistakes import Mistake, did_you_mean, listed
from runner.config.schema import Config, ParallelConfig

#: The axis that cuts matrix products; every other axis cuts the batch.
TENSOR = "tensor"


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices in a box.

    Attributes:
        axes: Name of each axis -> devices along it, the outermost first; none is one device.
    """

    axes: Mapping[str, int]

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.axes.values())

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The axes over which a batch is cut."""
        return tuple(name for name in self.axes if name != TENSOR)

    @property
    def batch_parts(self) -> int:
        """In how many parts a batch is cut."""
        return math.prod(self.axes[name] for name in self.batch_axes)

    def batch_parts_on(self, devices: Iterable[int]) -> tuple[int, ...]:
        """The parts of a batch that lie on some of the devices, which are numbered in order."""
        return tuple(sorted({self._batch_part(device) for device in devices}))

    def _batch_part(self, device: int) -> int:
        part, inside = 0, self.devices
        for name, size in self.axes.items():
            inside //= size
            at, device = divmod(device, inside)
            if name != TENSOR:
                part = part * size + at
        return part


def mesh_of(parallel: ParallelConfig, devices: int) -> Mesh:
    """The mesh over so many devices, of all hosts together."""
    if parallel.name == "single" or devices == 1:
        return Mesh({})
    if parallel.name == "fsdp_tensor":
        return Mesh({"fsdp": devices // parallel.tensor, TENSOR: parallel.tensor})
    return Mesh({parallel.name: devices})


def check_parallel(config: Config) -> None:
    """The rules that can be judged before hardware is looked for.

    Raises:
        Mistake: One is broken.
    """
    parallel = config.parallel
    if parallel.name not in names.PARALLEL:
        meant = did_you_mean(parallel.name, names.PARALLEL)
        raise Mistake(
            "parallel.name",
            f"parallel.name must be one of {listed(names.PARALLEL)}; got {parallel.name!r}{meant}",
        )
    _check_tensor(parallel)
    devices = stated_devices(config)
    if parallel.name == "single":
        _check_single(config)
        return
    if config.backend.name not in names.MESH_BACKENDS:
        raise Mistake(
            "parallel.name",
            f"parallel.name must be single with backend={config.backend.name}: "
            f"{names.NO_MESH[config.backend.name]}; got {parallel.name!r}. Use backend="
            f"{' or '.join(names.MESH_BACKENDS)}",
        )
    count = config.backend.steps_per_call
    if count > 1:
        raise Mistake(
            "backend.steps_per_call",
            f"backend.steps_per_call must be 1 with parallel={parallel.name}: random numbers of "
            f"several updates in one program were seen to differ on a mesh; got {count}",
        )
    if devices is None and config.hardware.name == "cpu":
        raise Mistake(
            "hardware.devices",
            f"hardware.devices must be given with parallel={parallel.name} and hardware=cpu: a "
            "CPU is as many devices as it is said to be, such as hardware.devices=8; got null",
        )
    if devices is not None:
        check_division(config, devices)


def check_division(config: Config, devices: int) -> None:
    """Everything that is cut over the mesh must divide by it.

    Args:
        config: The configuration.
        devices: Devices of all hosts together.

    Raises:
        Mistake: Something does not; names the nearest sizes that do.
    """
    parallel = config.parallel
    if devices % parallel.tensor:
        fitting = [str(n) for n in range(1, devices + 1) if devices % n == 0]
        raise Mistake(
            "parallel.tensor",
            f"parallel.tensor must divide the {devices} devices: it is one side of their mesh; got "
            f"{parallel.tensor}; what divides is {', '.join(fitting)}",
        )
    parts = mesh_of(parallel, devices).batch_parts
    _divides("job.batch_size", config.job.batch_size, parts, micro=config.accumulate_steps)
    _divides("job.eval_batch_size", config.job.eval_batch_size, parts)


def _divides(key: str, size: int, parts: int, *, micro: int = 1) -> None:
    factor = parts * micro
    if size % factor:
        each = f" and {micro} micro-batches" if micro > 1 else ""
        below = size - size % factor
        near = " and ".join(str(value) for value in (below, below + factor) if value)
        raise Mistake(
            key,
            f"{key} must be a multiple of {factor}: it is cut over {parts} devices{each}; got "
            f"{size}; the nearest are {near}",
        )


def _check_tensor(parallel: ParallelConfig) -> None:
    least = 2 if parallel.name == "fsdp_tensor" else 1
    if parallel.tensor < least:
        raise Mistake(
            "parallel.tensor",
            f"parallel.tensor must be >= {least} with parallel={parallel.name}: it is the number "
            f"of devices along the tensor axis; got {parallel.tensor}",
        )
    if parallel.tensor > 1 and parallel.name != "fsdp_tensor":
        raise Mistake(
            "parallel.tensor",
            f"parallel.tensor must be 1 with parallel={parallel.name}, which has no such axis "
            f"(parallel=fsdp_tensor has); got {parallel.tensor}",
        )


def _check_single(config: Config) -> None:
    devices = config.hardware.devices or 1
    if devices > 1:
        raise Mistake(
            "hardware.devices",
            "hardware.devices must be 1 with parallel=single: the others would stand idle; got "
            f"{devices}. Use parallel=data or parallel=fsdp for all of them",
        )


def stated_devices(config: Config) -> int | None:
    """The devices of all hosts, where the configuration itself tells."""
    hardware = config.hardware
    made = SLICES.get(hardware.name)
    return made.chips if made and hardware.devices is None else hardware.devices
