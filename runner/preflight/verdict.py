"""From a compiled step to a report: what it needs, what it costs, whether it fits.

Knows what the compiler's numbers mean. How they are got is `tpu_compiler`'s, how they are
shown is `runner.observe`'s.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

from runner.config.chips import SLICES, Chip
from runner.preflight import costs
from runner.preflight.buffers import Allocation, allocations, overflow
from runner.preflight.costs import Place
from runner.preflight.hlo import Instruction, Module
from runner.preflight.roofline import UNMODELLED, Work, kernel_cycles, roof
from runner.preflight.tpu_compiler import (
    Compiled,
    CompilerError,
    Label,
    TooLargeError,
    Topology,
    hlo_text,
)
from runner.preflight.trace import TracedStep
from runner.record import preflight as record

_LARGEST = 12
_DEAREST = 20
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is judged.

    Attributes:
        step: The traced step.
        hardware: The slice's name.
        chip: What it is made of.
        chips: How many of them are used.
        topology: What the compiler calls it.
        mesh: Axes of the mesh with their sizes.
        shares: For each argument of the step, in how many parts it is cut.
        batch_size: Examples a step.
        tokens: Tokens a step, or 0.
        versions: Of everything that decides the verdict.
    """

    step: TracedStep
    hardware: str
    chip: Chip
    chips: int
    topology: Topology
    mesh: Mapping[str, int]
    shares: list[int]
    batch_size: int
    tokens: int
    versions: Mapping[str, str]

    def label(self, name: str) -> Label | None:
        """An operation's name in the program, from its name in the traced HLO."""
        operation = self.step.operation(name)
        if operation is None:
            return None
        origin = operation.origin
        parts = [origin.phase, origin.module, operation.name]
        return Label("/".join(part for part in parts if part), origin.file, origin.line)

    @property
    def arguments_bytes(self) -> int:
        """Bytes of one chip's arguments, without padding."""
        arguments = zip(self.step.arguments, self.shares, strict=True)
        return sum(argument.bytes // share for argument, share in arguments)


def model_flops(subject: Subject, hlo: bytes) -> dict[Place, float]:
    """FLOPs of a whole step by place, recomputation left out: of layers and within kernels.

    Args:
        subject: What is judged.
        hlo: Its step before the compiler has changed it, a serialized `HloModuleProto`.
    """

    def place(name: str) -> Place:
        label = subject.label(name)
        return costs.place_of(label.name if label else "")

    counted = collections.Counter(costs.flops(Module(hlo_text(hlo)), place))
    for operation in subject.step.operations:
        if operation.kernel_flops:
            origin = operation.origin
            counted[Place(origin.phase, origin.module)] += operation.kernel_flops  # type: ignore[assignment]
    return {place: count for place, count in counted.items() if place.phase != "recompute"}


def accepted(
    subject: Subject, compiled: Compiled, *, flops: Mapping[Place, float]
) -> record.PreflightReport:
    """The report on a program that the compiler accepted.

    It need not fit: the compiler does not count results that have memory of their own.
    """
    module = Module(compiled.hlo)
    memory, capacity = compiled.memory, subject.chip.usable_hbm_bytes
    hbm = record.Hbm(
        arguments=memory.arguments,
        outputs=memory.outputs,
        aliased=memory.aliased,
        temporaries=memory.temporaries,
        program=memory.program,
        total=memory.total,
        capacity=capacity,
    )
    report = _report(subject, hbm, flops=flops, compile_s=compiled.seconds)
    sums = _collectives(module)
    work = Work(
        flops=costs.computed_flops(module) + costs.kernel_flops(module),
        model_flops=report.model_flops,
        hbm_bytes=costs.memory_bytes(module),
        wire_bytes=sum(one.wire_bytes for one in sums),
        examples=subject.batch_size,
        tokens=subject.tokens,
    )
    return dataclasses.replace(
        report,
        flops=work.flops,
        hbm_bytes=work.hbm_bytes,
        largest=_largest(subject, compiled.buffers, module),
        collectives=sums,
        roof=roof(work, chip=subject.chip, chips=subject.chips),
        estimate=_estimate(subject, module, flops),
    )


def refused(
    subject: Subject, error: TooLargeError, *, flops: Mapping[Place, float]
) -> record.PreflightReport:
    """The report on a program that the compiler cannot fit into memory."""
    found = overflow(error.report)
    assert found is not None, error.report
    arguments = found.arguments or subject.arguments_bytes
    hbm = record.Hbm(
        arguments=arguments,
        outputs=found.outputs,
        aliased=found.aliased,
        temporaries=found.temporaries,
        program=found.program,
        total=arguments + found.outputs - found.aliased + found.temporaries + found.program,
        capacity=found.capacity,
    )
    report = _report(subject, hbm, flops=flops, compile_s=error.seconds)
    return dataclasses.replace(report, largest=[_shown(one) for one in found.largest[:_LARGEST]])


def blamed(error: CompilerError) -> Instruction | None:
    """The instruction that a refusal names, by its own name or by that of its kernel."""
    if not error.hlo:
        return None
    words = set(re.findall(r"[\w.\-]+", error.report))
    parts = Module(error.hlo).computations.values()
    instructions = [one for part in parts for one in part.instructions]
    for instruction in instructions:
        if instruction.target in words:
            return instruction
    return next((one for one in instructions if one.name in words), None)


def _report(
    subject: Subject, hbm: record.Hbm, *, flops: Mapping[Place, float], compile_s: float
) -> record.PreflightReport:
    step = subject.step
    return record.PreflightReport(
        fits=hbm.total <= hbm.capacity,
        reason=_reason(subject, hbm),
        hardware=subject.hardware,
        chip=subject.topology.name,
        chips=subject.chips,
        mesh=dict(subject.mesh),
        batch_size=subject.batch_size,
        parameters=step.parameters,
        nodes=step.nodes,
        arguments_bytes=subject.arguments_bytes,
        model_flops=sum(flops.values()),
        flops=0.0,
        hbm_bytes=0.0,
        seconds=record.Seconds(step.trace_s, step.lower_s, compile_s),
        hbm=hbm,
        largest=[],
        collectives=[],
        roof=None,
        estimate=None,
        unmodelled=list(UNMODELLED),
        versions=dict(subject.versions),
    )


def _reason(subject: Subject, hbm: record.Hbm) -> str:
    needs = f"{hbm.total / _GIB:.2f} of {hbm.capacity / _GIB:.2f} GiB"
    chip = _chip(subject)
    if hbm.total <= hbm.capacity:
        free = (hbm.capacity - hbm.total) / _GIB
        return f"fits: needs {needs} on {chip}; {free:.2f} GiB are left"
    over = (hbm.total - hbm.capacity) / _GIB
    return f"does not fit: needs {needs} on {chip}; {over:.2f} GiB too much"


def _chip(subject: Subject) -> str:
    there = SLICES[subject.hardware].chips
    if subject.chips > 1:
        return f"each of {subject.chips} chips of {subject.hardware}"
    if there > 1:
        return f"the one chip of {subject.hardware}'s {there} that is used"
    return f"the chip of {subject.hardware}"


def _collectives(module: Module) -> list[record.CollectiveSum]:
    found = costs.collectives(module)
    return [
        record.CollectiveSum(
            kind=kind,
            count=sum(one.times for one in found if one.kind == kind),
            bytes=sum(one.times * one.bytes for one in found if one.kind == kind),
            wire_bytes=sum(one.times * one.wire_bytes for one in found if one.kind == kind),
        )
        for kind in costs.COLLECTIVES
        if any(one.kind == kind for one in found)
    ]


def _largest(subject: Subject, buffers: str, module: Module) -> list[record.Allocation]:
    operations = {
        instruction.name: (instruction.op_name, instruction.source)
        for computation in module.computations.values()
        for instruction in computation.instructions
    }
    names = [argument.name for argument in subject.step.arguments]
    found = allocations(buffers, arguments=names, operations=operations)
    return [_shown(one) for one in found[:_LARGEST]]


def _shown(one: Allocation) -> record.Allocation:
    return record.Allocation(one.kind, one.bytes, one.shape, one.what, one.source)


_OWN = {"optimizer": "(optimizer)", "step": "(clipping and averages)", "": "(the compiler's own)"}


def _estimate(subject: Subject, module: Module, flops: Mapping[Place, float]) -> record.Estimate:
    def cycles_of(instruction: Instruction) -> int | None:
        if instruction.kernel_work is None:
            return instruction.cycles
        return kernel_cycles(*instruction.kernel_work, chip=subject.chip)

    cycles, without = costs.cycles(module, cycles_of)
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for place, count in cycles.items():
        rows[_module(place)][_column(place)] += count
    work: collections.Counter[str] = collections.Counter()
    for place, amount in flops.items():
        work[_module(place)] += amount  # type: ignore[assignment]
    modules = [
        record.ModuleCost(
            name,
            forward=row["forward"],
            backward=row["backward"],
            other=row["other"],
            flops=float(work[name]),
        )
        for name, row in rows.items()
    ]
    total = _total(cycles.values())
    return record.Estimate(
        cycles=total,
        step_s=total / subject.chip.clock_hz,
        modules=sorted(modules, key=lambda one: -one.cycles),
        operations=[
            record.OperationCost(one.name, one.opcode, place.phase, _module(place), count)
            for one, place, count in costs.dearest(module, _DEAREST, cycles_of)
        ],
        without=without,
    )


def _total(values: Iterable[int]) -> int:
    return sum(values)


def _module(place: Place) -> str:
    return place.module or _OWN.get(place.phase, "(loss)")


def _column(place: Place) -> str:
    if place.phase in ("backward", "recompute"):
        return "backward"
    return "forward" if place.phase == "forward" else "other"
