"""Whether layers of one class compute the same, so that one of them can stand for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from runner.record.errors import ConfigError

_MISSING = object()
_TENSORS_AND_PARTS = set(vars(nn.Module()))


def refuse_unlike(layers: Sequence[nn.Module], traced: Callable[[nn.Module], str]) -> None:
    """Lets only layers pass that all compute what the first does.

    Layers are traced only where their attributes differ. Of those that are numbered, and differ
    in nothing else, the last is: a computation with the number in it is another one there.

    Args:
        layers: Modules of one class.
        traced: A layer's computation, by a name that only equal ones share.

    Raises:
        ConfigError: They do not.
    """
    first, suspects = layers[0], []
    for place, layer in enumerate(layers[1:], 1):
        differences = list(_differences(first, layer))
        if any(not _is_number(one, place) for one in differences) or (
            differences and place == len(layers) - 1
        ):
            suspects.append((place, differences))
    own = traced(first) if suspects else ""
    for place, differences in suspects:
        if traced(layers[place]) != own:
            name, ours, theirs = differences[0]
            raise ConfigError(
                f"scan_layers must be false with layers that do not compute the same: layer "
                f"{place} has {name} {theirs!r}, where layer 0 has {ours!r}; got true"
            )


def _differences(one: nn.Module, other: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Attributes that differ: dotted name, and both values."""
    if type(one) is not type(other):
        yield "class", type(one).__name__, type(other).__name__
        return
    ours, theirs = vars(one), vars(other)
    for name in sorted((ours.keys() | theirs.keys()) - (_TENSORS_AND_PARTS - {"training"})):
        values = ours.get(name, _MISSING), theirs.get(name, _MISSING)
        if not _same(*values):
            yield name, *values
    parts, others = dict(one.named_children()), dict(other.named_children())
    for name in sorted(parts.keys() | others.keys()):
        if name not in parts or name not in others:
            yield name, name in parts, name in others
            continue
        for inner, *both in _differences(parts[name], others[name]):
            yield f"{name}.{inner}", *both


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except (RuntimeError, TypeError, ValueError):  # an array's comparison is no truth
        return False


def _is_number(difference: tuple[str, Any, Any], place: int) -> bool:
    """Whether two values tell a layer's number and nothing more."""
    _, ours, theirs = difference
    return type(ours) is int and type(theirs) is int and theirs - ours == place
