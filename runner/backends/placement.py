"""Where a step's tensors go: to one XLA device, or cut over a mesh of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from runner.backends.sharding import Partition, Sharding, is_cut
from runner.backends.snapshot import HostPiece, HostTensor
from runner.xla import device
from runner.xla.mesh import open_mesh, pieces, to_host
from runner.xla.program import upload


class Placement(Protocol):
    """How tensors reach devices and come back.

    Attributes:
        device: What torch calls the one device, or all of them together.
    """

    device: torch.device

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A host batch on the device; may be called from another thread."""

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Small host tensors that a program takes, alike on every device."""

    def upload(self, tensors: Sequence[Tensor], partitions: Sequence[Partition]) -> list[Tensor]:
        """Host tensors in buffers of their own, which a program may overwrite."""

    def pin(self, tensors: Sequence[Tensor], partitions: Sequence[Partition]) -> None:
        """Fix how a program's results lie: as the inputs that they replace."""

    def pinned(self, tensor: Tensor, axes: tuple[str, ...]) -> Tensor:
        """A traced tensor, made to lie along `axes` with its first dimension."""

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Whole copies on the host.

        sync: waits until the programs that make them have ended.
        """

    def host_tensors(self, tensors: Sequence[Tensor]) -> list[HostTensor]:
        """Copies on the host in the pieces that the devices hold.

        sync: waits until the programs that make them have ended.
        """


class OneDevice:
    """Everything on the default XLA device."""

    def __init__(self) -> None:
        self.device = device.open_device()

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Placement.place`."""
        return device.place(batch, self.device)

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Placement.inputs`; the runtime takes them from the host as they are."""
        return list(tensors)

    def upload(self, tensors: Sequence[Tensor], partitions: Sequence[Partition]) -> list[Tensor]:
        """See `Placement.upload`."""
        return upload(tensors)

    def pin(self, tensors: Sequence[Tensor], partitions: Sequence[Partition]) -> None:
        """See `Placement.pin`; there is one place only."""

    def pinned(self, tensor: Tensor, axes: tuple[str, ...]) -> Tensor:
        """See `Placement.pinned`."""
        return tensor

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Placement.to_host`."""
        return device.to_host(tensors)

    def host_tensors(self, tensors: Sequence[Tensor]) -> list[HostTensor]:
        """See `Placement.host_tensors`."""
        return [
            HostTensor(tuple(values.shape), (HostPiece((0,) * values.dim(), values),))
            for values in device.to_host(tensors)
        ]


class OnMesh:
    """Tensors cut over a mesh, or whole on each of its devices.

    Args:
        sharding: The mesh, and what is cut how.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._mesh = open_mesh(sharding.mesh.axes)
        self.device = device.open_device()

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Placement.place`."""
        tensors = list(batch.values())
        partitions = [self._sharding.batch(tensor.shape) for tensor in tensors]
        return dict(zip(batch, self._mesh.upload(tensors, partitions), strict=True))

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Placement.inputs`."""
        return self._mesh.upload(tensors, [()] * len(tensors))

    def upload(self, tensors: Sequence[Tensor], partitions: Sequence[Partition]) -> list[Tensor]:
        """See `Placement.upload`."""
        return self._mesh.upload(tensors, partitions)

    def pin(self, tensors: Sequence[Tensor], partitions: Sequence[Partition]) -> None:
        """See `Placement.pin`."""
        for tensor, partition in zip(tensors, partitions, strict=True):
            self._mesh.pin(tensor, partition)

    def pinned(self, tensor: Tensor, axes: tuple[str, ...]) -> Tensor:
        """See `Placement.pinned`; a product, as an input of the program would be moved."""
        product = tensor * 1
        self._mesh.pin(product, (axes, *(() for _ in tensor.shape[1:])))
        return product

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Placement.to_host`."""
        return to_host(tensors)

    def host_tensors(self, tensors: Sequence[Tensor]) -> list[HostTensor]:
        """See `Placement.host_tensors`."""
        return [
            HostTensor(tuple(tensor.shape), tuple(HostPiece(*piece) for piece in parts))
            for tensor, parts in zip(tensors, pieces(tensors), strict=True)
        ]


def open_placement(sharding: Sharding) -> Placement:
    """The devices of a mesh; a mesh without axes is one device."""
    return OnMesh(sharding) if sharding.mesh.axes else OneDevice()


def partitions_of(
    held: Sequence[Sequence[int]], partitions: Sequence[Partition]
) -> list[Partition]:
    """The partition of every buffer of a layout; what lies with others is whole.

    Args:
        held: For every buffer the positions of its tensors: see `runner.backends.step.layout`.
        partitions: Of the tensors.
    """
    assert all(len(row) == 1 or not any(is_cut(partitions[i]) for i in row) for row in held)
    return [partitions[row[0]] if len(row) == 1 else ((),) for row in held]
