"""How a step's tensors lie on the chips of a slice, in the words of its compiler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from runner.backends.sharding import Partition
from runner.config.parallel import Mesh

if TYPE_CHECKING:
    from runner.preflight.trace import Argument


def shardings(
    mesh: Mesh, arguments: Sequence[Argument], results: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The `OpSharding` texts of a program's arguments and results, in order.

    A result that replaces an argument lies as it does, every other whole on each chip.
    """
    partitions = {argument.name: argument.partition for argument in arguments}
    return (
        [op_sharding(mesh, argument.partition) for argument in arguments],
        [op_sharding(mesh, partitions.get(name, ())) for name in results],
    )


def op_sharding(mesh: Mesh, partition: Partition) -> str:
    """A partition as `OpSharding`'s text, such as "{devices=[8,1]<=[8]}"; "" on one chip.

    Devices are numbered along the mesh, its last axis fastest. Source: `HloSharding::ToString`
    (XLA), the form with `<=` that lists tiles as a box of devices with its axes transposed.
    """
    if mesh.devices == 1:
        return ""
    cutting = [axis for axes in partition for axis in axes]
    if not cutting:
        return "{replicated}"
    others = [axis for axis in mesh.axes if axis not in cutting]
    tiles = [math.prod(mesh.axes[axis] for axis in axes) for axes in partition]
    copies = math.prod(mesh.axes[axis] for axis in others)
    if copies > 1:
        tiles.append(copies)
    names = list(mesh.axes)
    order = [names.index(axis) for axis in (*cutting, *others)]
    # XLA reads a box that is not turned only as one row of devices, and says nothing otherwise.
    turned = order != sorted(order)
    box = f"[{_listed(mesh.axes.values())}]T({_listed(order)})" if turned else f"[{mesh.devices}]"
    whole = " last_tile_dim_replicate" if copies > 1 else ""
    return f"{{devices=[{_listed(tiles)}]<={box}{whole}}}"


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(str(number) for number in numbers)
