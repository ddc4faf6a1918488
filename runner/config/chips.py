"""TPU chips and the slices that they are rented in: plain data, with its sources.

A slice is named as Google Cloud names it. Generations with two cores a chip count cores in the
name (v4-8 is four chips), the others count chips (v5e-8 is eight).

Source: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (read in 2025): tables of specifications and
of supported configurations. Clocks follow from them: peak FLOP/s is 2 x matrix units x their
area x clock. Usable memory is the limit that libtpu 0.0.21 states when a program is too large.
"""

from __future__ import annotations

import dataclasses
import math

GIB = 2**30

#: Chips in a virtual machine of a slice that has several.
_CHIPS_A_HOST = 4


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of a generation.

    Attributes:
        generation: As in the names of slices.
        hbm_bytes: Memory on the chip.
        usable_hbm_bytes: What of it a program may use: the runtime reserves the rest.
        peak_flops_per_s: In bfloat16.
        hbm_bytes_per_s: Memory bandwidth.
        link_bytes_per_s: What all links to neighbouring chips send together, one way; the
            documentation's "bidirectional" figure counts both ways.
        clock_hz: Of the cores.
        cores: What the name of a slice counts, a chip.
        largest_host: Most chips in one virtual machine.
        pci_id: The device's number on the PCI bus. Source: `jax/_src/hardware_utils.py` 0.7.1.
    """

    generation: str
    hbm_bytes: int
    usable_hbm_bytes: int
    peak_flops_per_s: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    clock_hz: float
    cores: int
    largest_host: int
    pci_id: str


# v4's links: Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer", 2023: six of
# 50 GB/s. The others': 1,600, 4,800 and 3,200 Gbit/s.
CHIPS = {
    chip.generation: chip
    for chip in (
        Chip("v4", 32 * GIB, int(30.75 * GIB), 275e12, 1228e9, 300e9, 1.05e9, 2, 4, "0x005e"),
        Chip("v5e", 16 * GIB, int(15.75 * GIB), 197e12, 819e9, 200e9, 1.5e9, 1, 8, "0x0063"),
        Chip("v5p", 95 * GIB, int(95.74 * GIB), 459e12, 2765e9, 600e9, 1.75e9, 2, 4, "0x0062"),
        Chip("v6e", 32 * GIB, int(31.25 * GIB), 918e12, 1640e9, 400e9, 1.75e9, 1, 8, "0x006f"),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are wired together and rented together.

    Attributes:
        name: As in `hardware=`.
        chip: What it is made of.
        shape: Chips along each axis of the interconnect.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Virtual machines, each of which runs one process."""
        return 1 if self.chips <= self.chip.largest_host else self.chips // _CHIPS_A_HOST

    @property
    def chips_per_host(self) -> int:
        """Chips that one virtual machine sees."""
        return self.chips // self.hosts

    @property
    def topology(self) -> str:
        """What the TPU compiler calls it, such as "v5e:2x4"."""
        return f"{self.chip.generation}:{'x'.join(str(side) for side in self.shape)}"


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SOLID = (
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
    (8, 8, 12),
    (8, 8, 16),
    (8, 16, 16),
)
_SHAPES = {"v4": _SOLID, "v5e": _FLAT, "v5p": (*_SOLID, (16, 16, 16), (16, 16, 24)), "v6e": _FLAT}

#: Every slice by its name.
SLICES = {
    made.name: made
    for generation, shapes in _SHAPES.items()
    for shape in shapes
    for made in [
        Slice(
            f"{generation}-{math.prod(shape) * CHIPS[generation].cores}", CHIPS[generation], shape
        )
    ]
}

#: Other names of slices: what the TPU API calls v5e.
ALIASES = {
    f"v5litepod-{made.chips}": made.name
    for made in SLICES.values()
    if made.chip.generation == "v5e"
}
