"""XLA's devices as one mesh (SPMD): placing host tensors cut, pinning results, reading back.

The only code that knows SPMD. With it on, torch_xla shows all devices as one; every program runs
on all of them. What is cut along which axis is said by the caller.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_xla.distributed import spmd

from runner.xla.binding import binding, torch_xla
from runner.xla.device import opening

#: For each dimension the axes that cut it; an empty tuple leaves it whole.
Partition = Sequence[tuple[str, ...]]
#: First index along each dimension, and the values there.
Piece = tuple[tuple[int, ...], Tensor]

_REPLICATED = "{replicated}"
_VARIABLE = "XLA_USE_SPMD"
_switched_on = False


def open_mesh(axes: Mapping[str, int]) -> DeviceMesh:
    """Turns SPMD on, which holds for the whole process and comes before its first tensor.

    Args:
        axes: Name of each axis of the mesh -> devices along it.

    Raises:
        AssertionError: The mesh has not as many devices as the process sees.
    """
    global _switched_on
    if _switched_on:
        # A warm process restores its environment between jobs; torch_xla asks for it again.
        os.environ[_VARIABLE] = "1"
    else:
        torch_xla.runtime.use_spmd()
        _switched_on = True
    return DeviceMesh(axes)


def device_count() -> int:
    """Devices of all hosts together.

    Raises:
        DeviceBusyError: Another process has them still.
        DeviceError: The runtime cannot open them.
    """
    with opening():
        return int(torch_xla.runtime.global_runtime_device_count())


def process_count() -> int:
    """Processes that the runtime's devices belong to, one a host."""
    return int(torch_xla.runtime.process_count())


def own_devices() -> list[int]:
    """Numbers of this host's devices among all."""
    names: list[str] = binding._xla_get_runtime_devices()
    return [int(name.rpartition(":")[2]) for name in names]


class DeviceMesh:
    """All devices, in a box with named axes.

    Args:
        axes: Name of each axis -> devices along it.
    """

    def __init__(self, axes: Mapping[str, int]) -> None:
        sizes = tuple(axes.values())
        devices = np.arange(int(np.prod(sizes)))
        self._mesh = spmd.Mesh(devices, sizes, tuple(axes))

    def upload(self, tensors: Sequence[Tensor], partitions: Sequence[Partition]) -> list[Tensor]:
        """Copies host tensors to the devices, each device getting its own part only.

        Every tensor has buffers of its own, also scalars of equal value: see
        `runner.xla.program.upload`.
        """
        host = [tensor.detach().cpu().contiguous() for tensor in tensors]
        names = [str(torch_xla.device())] * len(host)
        specs = [
            binding.XlaShardingSpec(tensor, *self._arguments(partition), False)
            for tensor, partition in zip(host, partitions, strict=True)
        ]
        uploaded: list[Tensor] = binding._xla_tensors_from_aten(host, names, specs)
        return uploaded

    def pin(self, tensor: Tensor, partition: Partition) -> None:
        """Fixes how a traced tensor lies, whatever XLA would choose for it.

        A program whose results lie otherwise than the inputs that they replace is compiled anew
        for its own results.
        """
        binding._xla_mark_sharding(tensor, binding.OpSharding(*self._arguments(partition)))

    def _arguments(self, partition: Partition) -> tuple[Any, Any, Any, int]:
        if not any(partition):
            return [], [], [], int(spmd.ShardingType.REPLICATED)
        spec = tuple((axes[0] if len(axes) == 1 else axes) if axes else None for axes in partition)
        found: tuple[Any, Any, Any, int] = self._mesh._get_op_sharding_args(spec)
        return found


def pieces(tensors: Sequence[Tensor]) -> list[list[Piece]]:
    """The parts of tensors that this host's devices hold, copied to the host, none twice.

    sync: waits until the programs that make them have ended.
    """
    specs = binding._get_xla_sharding_specs(list(tensors))
    cut = [t for t, spec in zip(tensors, specs, strict=True) if spec != _REPLICATED]
    whole = [t for t, spec in zip(tensors, specs, strict=True) if spec == _REPLICATED]
    found_cut = iter(_cut_pieces(cut))
    found_whole = iter(binding._xla_get_cpu_tensors(whole))
    return [
        next(found_cut) if spec != _REPLICATED else [((0,) * t.dim(), next(found_whole))]
        for t, spec in zip(tensors, specs, strict=True)
    ]


def _cut_pieces(tensors: list[Tensor]) -> list[list[Piece]]:
    places = binding._get_local_shard_replica_and_indices(tensors)
    shards = binding._get_local_shards(tensors)
    return [
        [
            (tuple(box.start for box in index), values)
            for (replica, index), (values, _) in zip(place, shard, strict=True)
            if replica == 0
        ]
        for place, shard in zip(places, shards, strict=True)
    ]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Whole copies on the host, put together there: no device ever holds more than its part.

    On several hosts, all of which must ask, the runtime puts them together on the devices.

    sync: waits until the programs that make them have ended.
    """
    if process_count() > 1:
        copies: list[Tensor] = binding._xla_get_cpu_tensors(list(tensors))
        return copies
    return [_joined(tensor, parts) for tensor, parts in zip(tensors, pieces(tensors), strict=True)]


def _joined(tensor: Tensor, parts: Sequence[Piece]) -> Tensor:
    if len(parts) == 1:
        return parts[0][1]
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for offset, values in parts:
        box = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
        whole[box] = values
    return whole


def held_bytes(tensors: Sequence[Tensor]) -> list[int]:
    """Bytes of tensors on each of this host's devices, as the runtime holds them."""
    totals: dict[str, int] = {}
    for shards in binding._get_local_shards(list(tensors)):
        for values, device in shards:
            size = values.numel() * values.element_size()
            totals[device] = totals.get(device, 0) + size
    return [totals[device] for device in sorted(totals)]
