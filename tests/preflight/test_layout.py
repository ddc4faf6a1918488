"""Partitions as the compiler is told them, read as the compiler reads them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from runner.backends.sharding import Partition
from runner.config.parallel import Mesh
from runner.preflight.layout import op_sharding

SQUARE = Mesh({"fsdp": 4, "tensor": 2})
TEXT = re.compile(r"\{devices=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?( last_tile_dim\w+)?\}")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def tiles_of(text: str, dims: int) -> dict[int, tuple[int, ...]]:
    """Of every device, which tile along each dimension it holds."""
    found = TEXT.fullmatch(text)
    assert found is not None, text
    tiles, box = numbers(found[1]), numbers(found[2])
    assert found[3] or len(box) == 1  # XLA takes anything else for no sharding at all
    order = numbers(found[3]) if found[3] else range(len(box))
    devices = np.arange(np.prod(box)).reshape(box).transpose(order).reshape(tiles)
    assert len(tiles) == dims + bool(found[4])
    return {int(devices[at]): at[:dims] for at in np.ndindex(*tiles)}


@pytest.mark.parametrize(
    "partition",
    [
        (("fsdp",), ("tensor",)),
        (("tensor",), ("fsdp",)),
        (("fsdp",), ()),
        ((), ("tensor",)),
        (("fsdp", "tensor"), ()),
    ],
)
def test_each_device_is_told_the_tile_of_its_place_in_the_mesh(partition: Partition) -> None:
    held = tiles_of(op_sharding(SQUARE, partition), dims=2)
    for device in range(SQUARE.devices):
        place = dict(zip(SQUARE.axes, divmod(device, 2), strict=True))
        for tile, axes in zip(held[device], partition, strict=True):
            assert tile == int(
                np.ravel_multi_index(
                    [place[axis] for axis in axes] or [0],
                    [SQUARE.axes[axis] for axis in axes] or [1],
                )
            )


def test_what_no_axis_cuts_is_whole_and_one_chip_is_told_nothing() -> None:
    assert op_sharding(SQUARE, ((), ())) == op_sharding(SQUARE, ()) == "{replicated}"
    assert op_sharding(Mesh({}), ()) == ""


def test_the_text_for_a_batch_is_the_one_that_xla_prints() -> None:
    assert op_sharding(Mesh({"data": 8}), (("data",), ())) == "{devices=[8,1]<=[8]}"
