"""Hardware: what is there, and the environment that a worker needs before torch_xla loads."""

from __future__ import annotations

import dataclasses
import pathlib

from runner.config.schema import HardwareConfig
from runner.record.errors import DeviceError

#: Device files by which a TPU VM shows its chips (v2-v4, and v5e and later).
TPU_DEVICE_FILES = ("accel*", "vfio/[0-9]*")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Hardware that was found.

    Attributes:
        kind: "cpu" or "tpu".
        devices: Devices that the job uses.
        notice: What the user should be told once, or "".
    """

    kind: str
    devices: int
    notice: str = ""

    def environment(self) -> dict[str, str]:
        """Variables that must be set before torch_xla is imported."""
        if self.kind == "tpu":
            return {"PJRT_DEVICE": "TPU"}
        return {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(self.devices)}


def find_hardware(config: HardwareConfig, *, dev: pathlib.Path = pathlib.Path("/dev")) -> Hardware:
    """The hardware that `hardware=` names.

    Args:
        config: The `hardware` section.
        dev: The folder of device files.

    Raises:
        DeviceError: A TPU was asked for and there is none, or it has too few chips.
    """
    chips = [path for pattern in TPU_DEVICE_FILES for path in sorted(dev.glob(pattern))]
    if config.name == "cpu" or (config.name == "auto" and not chips):
        notice = "no TPU found; running on the CPU" if config.name == "auto" else ""
        return Hardware("cpu", config.devices or 1, notice)
    if not chips:
        looked = " and ".join(str(dev / pattern) for pattern in TPU_DEVICE_FILES)
        raise DeviceError(
            f"hardware={config.name} needs a TPU, but this machine has no chip: "
            f"looked for {looked}; use hardware=cpu to run without one"
        )
    if (config.devices or 0) > len(chips):
        raise DeviceError(
            f"hardware.devices must be <= {len(chips)}, the TPU chips of this machine; "
            f"got {config.devices}"
        )
    return Hardware("tpu", config.devices or len(chips))
