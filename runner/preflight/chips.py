"""Slices of TPUs: their chips, and what libtpu calls their topology."""

from __future__ import annotations

import dataclasses

from runner.preflight.tpu_compiler import Topology
from runner.record.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. Source: Google Cloud's TPU pages, one a version.

    Attributes:
        hbm_bytes: That a program may use: what is there less what the runtime reserves.
        peak_flops_per_s: In bfloat16, as float32 products use it too (one pass, XLA's default).
        hbm_bytes_per_s: Main memory's bandwidth.
        link_bytes_per_s: What all links to other chips send together.
        clock_hz: Of the compiler's cycles.
    """

    hbm_bytes: int
    peak_flops_per_s: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    clock_hz: float


CHIPS = {
    "v4": Chip(int(30.75 * 2**30), 275e12, 1228e9, 300e9, 1.05e9),
    "v5e": Chip(int(15.75 * 2**30), 197e12, 819e9, 200e9, 1.5e9),
    "v5p": Chip(int(95.74 * 2**30), 459e12, 2765e9, 600e9, 1.75e9),
    "v6e": Chip(int(31.25 * 2**30), 918e12, 1638e9, 400e9, 1.75e9),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice to compile for."""

    name: str
    chips: int
    chip: Chip
    topology: Topology


def find_slice(name: str) -> Slice:
    """The slice of a name such as "v5e-8"."""
    kind, _, size = name.partition("-")
    if kind not in CHIPS or not size.isdigit():
        raise ConfigError(f"hardware must be a slice; got {name!r}")
    chips = int(size) // (2 if kind in ("v4", "v5p") else 1)
    return Slice(name, chips, CHIPS[kind], _topology(kind, chips))


def _topology(kind: str, chips: int) -> Topology:
    sides = _sides(chips, 3 if kind in ("v4", "v5p") else 2)
    options: dict[str, object] = {"chip_config_name": "megacore"} if kind in ("v4", "v5p") else {}
    if chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    return Topology(f"{kind}:{'x'.join(str(side) for side in sides)}", options)


def _sides(chips: int, axes: int) -> list[int]:
    sides = [1] * axes
    axis = 0
    while chips > 1:
        order = sorted(range(axes), key=lambda a: (sides[a], a))
        axis = order[0]
        sides[axis] *= 2
        chips //= 2
    return sorted(sides) if axes == 2 else sorted(sides, reverse=True)
