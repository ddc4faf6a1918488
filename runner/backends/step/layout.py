"""How the tensors that a step carries lie on the device.

A tensor that can never differ from another is carried once, and small ones of one role (biases
and norms, their momenta, step counters) lie side by side in one buffer: every buffer costs the
host and the runtime time on every call, however small it is. Kernels of convolutions lie as XLA
reads them. Refuses to know what roles mean.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: Elements below which a tensor is small. Copying more costs more than a buffer of its own.
SMALL = 4096


def is_small(tensor: Tensor) -> bool:
    """Whether a tensor is worth no buffer of its own, nor an update of its own."""
    return tensor.numel() < SMALL and tensor.is_contiguous()


def lying_order(dims: int) -> list[int] | None:
    """The order of dimensions in which a tensor lies; None for its own.

    A convolution's kernel is [out, in, *window] in PyTorch. XLA computes with, and gets gradients
    as, [*window, in, out]; in any other order each step pays for transposing all kernels.
    """
    return [*range(2, dims), 1, 0] if dims >= 4 else None


def standing_order(dims: int) -> list[int] | None:
    """The order that undoes `lying_order`."""
    return [dims - 1, dims - 2, *range(dims - 2)] if dims >= 4 else None


def lay(tensor: Tensor) -> Tensor:
    """A view of a tensor in the order in which it lies."""
    order = lying_order(tensor.dim())
    return tensor if order is None else tensor.permute(order)


def stand(tensor: Tensor) -> Tensor:
    """Undoes `lay`."""
    order = standing_order(tensor.dim())
    return tensor if order is None else tensor.permute(order)


@dataclasses.dataclass(frozen=True)
class _Pack:
    """Tensors of one role and type in one buffer: their positions, and each one's shape."""

    positions: tuple[int, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [shape.numel() for shape in self.shapes]


class Layout:
    """From all tensors of a step, in its order, to the buffers that hold them, and back.

    Works alike on values, on traced tensors, on the host and on the device.

    Args:
        tensors: All tensors, for their shapes and types.
        merged: Positions of tensors that are not held, each with the one that stands for it.
        roles: For every tensor, with which others it may lie in one buffer; None for one that
            stays as it is.

    Attributes:
        held: For every buffer, the positions of the tensors that lie in it.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        merged: Mapping[int, int],
        roles: Sequence[Hashable | None],
    ) -> None:
        self._merged = dict(merged)
        self._count = len(tensors)
        alike: collections.defaultdict[Hashable, list[int]] = collections.defaultdict(list)
        for position, (tensor, role) in enumerate(zip(tensors, roles, strict=True)):
            if position not in merged and role is not None and is_small(tensor):
                alike[role, tensor.dtype].append(position)
        self._packs = [
            _Pack(tuple(positions), tuple(tensors[i].shape for i in positions))
            for positions in alike.values()
            if len(positions) > 1
        ]
        packed = {i for pack in self._packs for i in pack.positions}
        own = (i for i in range(self._count) if i not in merged)
        self._singles = [i for i in own if i not in packed]
        self._lying = {i for i in self._singles if roles[i] is not None}
        self.held = [[i] for i in self._singles] + [list(pack.positions) for pack in self._packs]

    def __len__(self) -> int:
        return len(self.held)

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The buffers of all tensors."""
        own = [lay(tensors[i]) if i in self._lying else tensors[i] for i in self._singles]
        packed = [
            torch.cat([tensors[i].reshape(-1) for i in pack.positions]) for pack in self._packs
        ]
        return [*own, *packed]

    def unpack(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """All tensors of the buffers; packed ones are views, merged ones the same tensor."""
        own = zip(self._singles, buffers[: len(self._singles)], strict=True)
        held = {i: stand(buffer) if i in self._lying else buffer for i, buffer in own}
        for pack, buffer in zip(self._packs, buffers[len(self._singles) :], strict=True):
            pieces = torch.split(buffer, pack.sizes)
            for position, piece, shape in zip(pack.positions, pieces, pack.shapes, strict=True):
                held[position] = piece.view(shape)
        return [held[self._merged.get(i, i)] for i in range(self._count)]

    def apart(self, held: Sequence[T]) -> list[T]:
        """What each buffer stands for, of every tensor; no buffer may hold several."""
        assert not self._packs
        own = dict(zip(self._singles, held, strict=True))
        return [own[self._merged.get(i, i)] for i in range(self._count)]

    def equal_groups(self) -> list[list[int]]:
        """Positions that share one tensor, group by group."""
        groups: collections.defaultdict[int, list[int]] = collections.defaultdict(list)
        for position, standing in self._merged.items():
            groups[standing].append(position)
        return [[standing, *positions] for standing, positions in groups.items()]
