"""Tensors of layers that repeat, carried one on the other as [layers, ...].

A stack is one tensor to the traced step and to the device; in the state it is still one tensor a
layer, by the names that the model gives them. Scalars of the optimizer's state, which are the same
for all layers, are carried once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from runner.backends.sharding import Partition, Sharding
from runner.backends.snapshot import HostPiece, HostTensor
from runner.record.errors import CheckpointError, ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Carried:
    """One tensor that a step carries.

    Attributes:
        group: "params", "buffers" or "optimizer": see `runner.backends.state.TrainState`.
        members: Names in that group of what lies in it: one, or one for each layer of a stack.
        name: Of all of it.
    """

    group: str
    members: tuple[str, ...]
    name: str

    @property
    def is_stack(self) -> bool:
        """Whether it is of several layers."""
        return len(self.members) > 1


class Stacks:
    """The stacks of a model's tensors.

    Args:
        members: For the name of each stack those of its tensors: see `find_stacks`.
    """

    def __init__(self, members: Mapping[str, tuple[str, ...]]) -> None:
        self._members = dict(members)
        self._name_of = {own[0]: name for name, own in members.items()}
        self._rest = {name for own in members.values() for name in own[1:]}

    def members(self, name: str) -> tuple[str, ...]:
        """The tensors in a stack, or the one tensor of a name."""
        return self._members.get(name, (name,))

    def collapsed(self, names: Iterable[str]) -> list[str]:
        """Names of tensors in order, those of a stack as one in the place of its first."""
        return [self._name_of.get(name, name) for name in names if name not in self._rest]

    def value(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """A stack made of its tensors, or the one tensor of a name."""
        own = [tensors[member] for member in self.members(name)]
        return torch.stack(own) if len(own) > 1 else own[0]


def find_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of layers that repeat, by the name of all of them: `layers.*`, `layers.1-3`.

    Layers are modules with parts of their own, one after the other in a list, of one class and
    with tensors of the same names, shapes and types.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        path = f"{name}." if name else ""
        for _, run in itertools.groupby(module.named_children(), lambda item: _kind(item[1])):
            layers = list(run)
            if len(layers) > 1 and any(True for _ in layers[0][1].children()):
                whole = len(layers) == len(module)
                span = "*" if whole else f"{layers[0][0]}-{layers[-1][0]}"
                found[path + span] = tuple(path + child for child, _ in layers)
    return found


def find_stacks(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of tensors that may lie on each other, by the name of all: `layers.*.weight`.

    No tensor is in two stacks, or has two names.
    """
    uses = Counter(id(tensor) for _, tensor in _tensors(model, remove_duplicate=False))
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for whole, layers in find_layers(model).items():
        for own, tensor in _tensors(model.get_submodule(layers[0])):
            members = tuple(f"{layer}.{own}" for layer in layers)
            if uses[id(tensor)] == 1 and not taken.intersection(members):
                taken.update(members)
                found[f"{whole}.{own}"] = members
    return found


def _tensors(module: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=remove_duplicate)
    yield from module.named_buffers(remove_duplicate=remove_duplicate)


def _kind(module: nn.Module) -> object:
    own = _tensors(module)
    return type(module), tuple((name, t.shape, t.dtype, t.requires_grad) for name, t in own)


def _layer(value: Tensor, place: int) -> Tensor:
    return value[place] if value.dim() else value


def _pieces_of_layer(value: HostTensor, place: int) -> HostTensor:
    if not value.shape:
        return value
    pieces = (HostPiece(one.offset[1:], one.values[place]) for one in value.pieces)
    return HostTensor(value.shape[1:], tuple(pieces))


def apart(carried: Sequence[Carried], values: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Values by group and name; those of a stack are views of it."""
    return _apart(carried, values, _layer)


def pieces_apart(
    carried: Sequence[Carried], values: Sequence[HostTensor]
) -> dict[str, dict[str, HostTensor]]:
    """As `apart`, of tensors in pieces; layers are never cut from each other."""
    return _apart(carried, values, _pieces_of_layer)


def _apart(
    carried: Sequence[Carried], values: Sequence[T], take: Callable[[T, int], T]
) -> dict[str, dict[str, T]]:
    groups: dict[str, dict[str, T]] = {"params": {}, "buffers": {}, "optimizer": {}}
    for one, value in zip(carried, values, strict=True):
        for place, name in enumerate(one.members):
            groups[one.group][name] = take(value, place) if one.is_stack else value
    return groups


def together(
    carried: Sequence[Carried], groups: Mapping[str, Mapping[str, Tensor]]
) -> list[Tensor]:
    """Undoes `apart`.

    Raises:
        CheckpointError: Scalars differ that are carried once.
    """
    return [_together(one, [groups[one.group][name] for name in one.members]) for one in carried]


def _together(one: Carried, values: Sequence[Tensor]) -> Tensor:
    if not one.is_stack:
        return values[0]
    if values[0].dim():
        return torch.stack(list(values))
    for name, value in zip(one.members, values, strict=True):
        if not torch.equal(value, values[0]):
            raise CheckpointError(
                f"scan_layers must be false to go on from this state: {name} is {value.item()} and "
                f"{one.members[0]} is {values[0].item()}, which a scanned stack carries once"
            )
    return values[0]


def partitions(
    carried: Sequence[Carried], shapes: Sequence[Sequence[int]], sharding: Sharding
) -> list[Partition]:
    """How everything carried is to lie; layers are not cut from each other.

    Raises:
        ConfigError: A rule of the job does not fit its parameter, or not all layers.
    """
    each = [s[1:] if one.is_stack else s for one, s in zip(carried, shapes, strict=True)]
    for one, shape in zip(carried, each, strict=True):
        if one.is_stack and one.group == "params":
            found = {sharding.parameter(name, shape) for name in one.members}
            if len(found) > 1:
                raise ConfigError(
                    f"scan_layers must be false with sharding rules that differ from layer to "
                    f"layer: they do for {one.name}; got true"
                )
    names = [(one.group, one.members[0]) for one in carried]
    own = sharding.carried(names, each)
    return [
        ((), *partition) if one.is_stack and shape else partition
        for one, shape, partition in zip(carried, shapes, own, strict=True)
    ]
