"""What a preflight found: the part of `result.json` that the child writes and the parent shows.

Plain values only. All bytes and FLOPs are of one chip and one step unless a name says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from runner.record.rundir import RunDir


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What the preflight itself took; `compile` is of the compile that is reported."""

    trace: float
    lower: float
    compile: float


@dataclasses.dataclass(frozen=True)
class Hbm:
    """Bytes in a chip's main memory. Of a program that is too large, those that are known.

    Attributes:
        arguments: State, batch and rates.
        outputs: Results, those that take an argument's place included.
        aliased: What results take of arguments.
        temporaries: What lives within a step.
        program: Code.
        total: What a step needs at once.
        capacity: What a program may use.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int
    total: int
    capacity: int


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One of the largest arrays: what it is, its shape as the compiler writes it, its line."""

    kind: str
    bytes: int
    shape: str
    what: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class CollectiveSum:
    """All collectives of a kind: how many run in a step, their bytes, what a chip sends."""

    kind: str
    count: int
    bytes: int
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class Roof:
    """The least time that a step of this program can take on this chip, and what binds it.

    Attributes:
        compute_s: FLOPs at the chip's peak.
        hbm_s: Bytes at its memory's bandwidth.
        interconnect_s: Bytes sent at its links' bandwidth.
        binds: "compute", "hbm" or "interconnect": the longest.
        step_s: The longest.
        examples_per_s: Of the whole slice, at that time.
        tokens_per_s: As examples, for text; else 0.
        mfu: Model FLOPs at that time over the slice's peak: no run can have a higher one.
    """

    compute_s: float
    hbm_s: float
    interconnect_s: float
    binds: str
    step_s: float
    examples_per_s: float
    tokens_per_s: float
    mfu: float


@dataclasses.dataclass(frozen=True)
class ModuleCost:
    """What a module costs by the compiler's estimate, in cycles, and its model FLOPs."""

    module: str
    forward: int
    backward: int
    other: int
    flops: float

    @property
    def cycles(self) -> int:
        """All of its cycles."""
        return self.forward + self.backward + self.other


@dataclasses.dataclass(frozen=True)
class OperationCost:
    """What an operation of the program costs by the compiler's estimate, and where it is from."""

    name: str
    opcode: str
    phase: str
    module: str
    cycles: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's own cost model; of kernels that state their work, which it skips, the roof.

    Attributes:
        cycles: Sum over a step, loop bodies times their trips.
        step_s: The same at the chip's clock.
        modules: By module, dearest first.
        operations: The dearest ones, dearest first.
        without: Operations that have no estimate, by opcode.
    """

    cycles: int
    step_s: float
    modules: list[ModuleCost]
    operations: list[OperationCost]
    without: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Trial:
    """Another configuration that was compiled, or could be: `change` is its override."""

    change: str
    why: str = ""
    fits: bool | None = None
    total: int = 0
    step_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class PreflightReport:
    """The whole report.

    Attributes:
        fits: The verdict.
        reason: One sentence for it.
        hardware: Such as "v5e-8".
        chip: What libtpu calls the chip.
        chips: Of the slice.
        mesh: Axes of the mesh with their sizes.
        batch_size: Examples a step, over all chips.
        parameters: Of the model.
        nodes: Operations that were traced.
        arguments_bytes: What the parameters, state and batch of one chip add up to.
        model_flops: Of the whole step on all chips: convolutions and matrix products.
        flops: Of one chip, as compiled.
        hbm_bytes: That a chip moves to and from main memory.
        cached: Whether the verdict came from the cache.
        unmodelled: What the numbers leave out.
    """

    fits: bool
    reason: str
    hardware: str
    chip: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    nodes: int
    arguments_bytes: int
    model_flops: float
    flops: float
    hbm_bytes: float
    seconds: Seconds
    hbm: Hbm
    largest: list[Allocation]
    collectives: list[CollectiveSum]
    roof: Roof | None
    estimate: Estimate | None
    unmodelled: list[str]
    versions: dict[str, str]
    suggestions: list[Trial] = dataclasses.field(default_factory=list)
    search: list[Trial] = dataclasses.field(default_factory=list)
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return dataclasses.asdict(self)

    def figures(self) -> dict[str, float]:
        """The report's scalars, for TensorBoard and for a sweep's table, by tag."""
        values = {
            "preflight/fits": float(self.fits),
            "preflight/hbm_bytes": float(self.hbm.total),
            "preflight/hbm_fraction": self.hbm.total / self.hbm.capacity,
            "preflight/compile_s": self.seconds.compile,
            "preflight/model_flops": self.model_flops,
        }
        if self.roof is not None and self.estimate is not None:
            values["preflight/roof_step_ms"] = 1e3 * self.roof.step_s
            values["preflight/roof_examples_per_s"] = self.roof.examples_per_s
            values["preflight/roof_mfu"] = self.roof.mfu
            values["preflight/estimated_step_ms"] = 1e3 * self.estimate.step_s
        return values


def report_from_json(plain: Mapping[str, Any]) -> PreflightReport:
    """The report that `to_json` wrote.

    Raises:
        TypeError: It is not one, or one of another version.
        KeyError: As TypeError.
    """
    values = dict(plain)
    values["seconds"] = Seconds(**values["seconds"])
    values["hbm"] = Hbm(**values["hbm"])
    values["largest"] = [Allocation(**one) for one in values["largest"]]
    values["collectives"] = [CollectiveSum(**one) for one in values["collectives"]]
    if values["roof"] is not None:
        values["roof"] = Roof(**values["roof"])
    if values["estimate"] is not None:
        estimate = dict(values["estimate"])
        estimate["modules"] = [ModuleCost(**one) for one in estimate["modules"]]
        estimate["operations"] = [OperationCost(**one) for one in estimate["operations"]]
        values["estimate"] = Estimate(**estimate)
    for name in ("suggestions", "search"):
        values[name] = [Trial(**one) for one in values[name]]
    return PreflightReport(**values)


def preflight_of(run_dir: RunDir) -> PreflightReport | None:
    """What the preflight of a run found; None where there is none, or of another version."""
    try:
        plain = json.loads(run_dir.result.read_text())["preflight"]
        return None if plain is None else report_from_json(plain)
    except (OSError, ValueError, KeyError, TypeError):
        return None
