"""A training state on the host, as pieces of tensors that may be sharded.

A piece is a box of a whole tensor: with one device it is all of it, with several it is what a
device holds. This is the form in which a state is saved, whatever it was sharded like; files and
folders are not known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from runner.backends.state import TrainState


@dataclasses.dataclass(frozen=True)
class HostPiece:
    """A box of a tensor: its first index along each dimension, and its values on the host."""

    offset: tuple[int, ...]
    values: Tensor


@dataclasses.dataclass(frozen=True)
class HostTensor:
    """A whole tensor's shape, and the pieces of it that this host saves."""

    shape: tuple[int, ...]
    pieces: tuple[HostPiece, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type that all pieces have."""
        return self.pieces[0].values.dtype


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A state after `step` updates: `<group>/<name>` to the tensor, in the order of groups."""

    step: int
    tensors: Mapping[str, HostTensor]


def snapshot_of(state: TrainState) -> Snapshot:
    """A snapshot of a state whose tensors are whole, on the host, and nobody else's."""
    tensors = {
        f"{group}/{name}": HostTensor(
            tuple(tensor.shape), (HostPiece((0,) * tensor.dim(), tensor),)
        )
        for group, named in state.groups().items()
        for name, tensor in named.items()
    }
    return Snapshot(state.step, tensors)
