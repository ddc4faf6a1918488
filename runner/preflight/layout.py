"""How a step's tensors lie on the chips of a slice."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from runner.preflight.trace import Argument


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shardings of a program's arguments and results.

    Attributes:
        mesh: Axes with their sizes.
        arguments: `OpSharding` texts in the order of the arguments; "" on one chip.
        results: The same for the results.
    """

    mesh: Mapping[str, int]
    arguments: list[str]
    results: list[str]

    @property
    def shares(self) -> list[int]:
        """In how many parts each argument is cut."""
        return [parts(sharding) for sharding in self.arguments]


def layout(chips: int, arguments: Sequence[Argument], results: Sequence[str]) -> Layout:
    """Batches cut over all chips, everything else whole on each."""
    if chips == 1:
        return Layout({}, [""] * len(arguments), [""] * len(results))

    def cut(argument: Argument) -> str:
        if argument.group != "batch":
            return "{replicated}"
        tiles = [chips, *[1] * (len(argument.shape) - 1)]
        return f"{{devices=[{','.join(map(str, tiles))}]<=[{chips}]}}"

    return Layout({"data": chips}, [cut(one) for one in arguments], ["{replicated}"] * len(results))


def parts(sharding: str) -> int:
    """In how many parts an `OpSharding` text cuts a tensor."""
    tiles = re.search(r"devices=\[([\d,]+)\]", sharding)
    if tiles is None:
        return 1
    sizes = [int(size) for size in tiles[1].split(",")]
    return math.prod(sizes[:-1] if "last_tile_dim_replicate" in sharding else sizes)
