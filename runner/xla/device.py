"""The XLA device: opening it, seeding it, moving batches to it, waiting for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from runner.record.errors import DeviceBusyError, DeviceError, is_busy
from runner.xla.binding import binding, torch_xla, xla_model


def open_device() -> torch.device:
    """The default XLA device of this process, which `PJRT_DEVICE` chose.

    Raises:
        DeviceBusyError: Another process has it still.
        DeviceError: The runtime cannot open it: there is no chip, say.
    """
    with opening():
        device: torch.device = torch_xla.device()
    return device


def is_cpu() -> bool:
    """Whether XLA's devices are the host's CPU."""
    return bool(torch_xla.runtime.device_type() == "CPU")


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """Around what opens the runtime, whose errors it makes ours."""
    try:
        yield
    except RuntimeError as error:
        kind = DeviceBusyError if is_busy(str(error)) else DeviceError
        raise kind(f"the XLA device cannot be opened: {error}") from error


def manual_seed(seed: int) -> None:
    """Seed the random operations that run on the device from now on."""
    torch_xla.manual_seed(seed)  # type: ignore[no-untyped-call]


def sync() -> None:
    """Hand all pending lazy operations to the device; does not wait for them."""
    torch_xla.sync()


def wait() -> None:
    """Wait until the device has done everything that it was handed."""
    torch_xla.sync()
    xla_model.wait_device_ops()


def place(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device: one transfer for all of its tensors."""
    names = list(batch)
    moved = binding._xla_tensors_from_aten(
        [batch[name] for name in names], [str(device)] * len(names), None
    )
    return dict(zip(names, moved, strict=True))


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host: one transfer for all.

    sync: waits until the programs that make them have ended.
    """
    on_host: list[Tensor] = binding._xla_get_cpu_tensors(list(tensors))
    return on_host


def memory_bytes(device: torch.device) -> int | None:
    """Bytes that the runtime holds on the device, or None where it does not tell (CPU)."""
    try:
        return int(xla_model.get_memory_info(device)["bytes_used"])
    except RuntimeError:
        return None
