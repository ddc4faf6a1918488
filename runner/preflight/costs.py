"""What a program costs: FLOPs, main memory traffic, collectives and estimated cycles.

Counts on parsed HLO, loop bodies times their trips. Knows no chip: what a cost means in
seconds is `runner.preflight.roofline`'s.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
import math
import re
from collections.abc import Callable, Iterator

from runner.preflight.hlo import Array, Computation, Instruction, Module

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

#: No work of their own: they name, group or start what is counted elsewhere.
_FREE = {
    "add-dependency",
    "after-all",
    "async-done",
    "async-start",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "copy-done",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_SLICES = ("dynamic-slice", "slice", "slice-start", "gather")


@dataclasses.dataclass(frozen=True)
class Place:
    """Which part of the step an operation belongs to: a phase and a module's dotted path."""

    phase: str
    module: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a step.

    Attributes:
        kind: One of `COLLECTIVES`.
        bytes: Of the whole array that a chip ends or begins with, whichever is larger.
        group: Chips that take part.
        times: How often it runs in a step.
        place: What it belongs to.
    """

    kind: str
    bytes: int
    group: int
    times: int
    place: Place

    @property
    def wire_bytes(self) -> float:
        """Bytes that a chip sends in one run, by the ring algorithm."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        share = self.bytes * (self.group - 1) / self.group
        return 2 * share if self.kind == "all-reduce" else share


PlaceOf = Callable[[str], Place]


def place_of(op_name: str) -> Place:
    """The place in a labelled operation's name, `phase/module/op` or `phase/op`."""
    parts = op_name.split("/")
    if len(parts) == 3:
        return Place(parts[0], parts[1])
    return Place(parts[0] if len(parts) == 2 else "", "")


def flops(module: Module, place: PlaceOf) -> dict[Place, float]:
    """FLOPs of convolutions and matrix products, as `torch.utils.flop_counter` counts them.

    Args:
        module: A program before optimization.
        place: From an operation's name to its place.
    """
    counted: collections.defaultdict[Place, float] = collections.defaultdict(float)
    for instruction, inside, times in _products(module):
        count = _flops(instruction, inside, positions=_dense_positions)
        counted[place(instruction.op_name)] += times * count
    return dict(counted)


def computed_flops(module: Module) -> float:
    """FLOPs of the convolutions and matrix products of an optimized program, padding left out.

    There a matrix product, too, is a convolution, and where products are many their number is an
    axis of the window that nearly always lies on padding.
    """
    return sum(
        times * _flops(instruction, inside, positions=_real_positions)
        for instruction, inside, times in _products(module)
    )


def _products(module: Module) -> Iterator[tuple[Instruction, Computation, int]]:
    """Every convolution and matrix product, where it is and how often it runs."""
    for computation, times in module.runs():
        for inside in _fused(computation, module):
            for instruction in inside.live():
                if instruction.opcode in ("convolution", "dot"):
                    yield instruction, inside, times


#: Products along an axis of a window, from the convolution, the axis and the sizes of input and
#: result there.
_Positions = Callable[[Instruction, int, int, int], int]


def _flops(instruction: Instruction, computation: Computation, *, positions: _Positions) -> float:
    if instruction.opcode == "dot":
        return _dot_flops(instruction, _operand(instruction, 0, computation))
    left, right = (_operand(instruction, i, computation) for i in (0, 1))
    return _convolution_flops(instruction, left, right, positions=positions)


def _operand(instruction: Instruction, index: int, computation: Computation) -> Array:
    return computation.by_name[instruction.operands[index]].results[0]


def _dot_flops(dot: Instruction, left: Array) -> float:
    contracted = [int(d) for d in dot.braced("lhs_contracting_dims").split(",") if d]
    return 2.0 * dot.results[0].elements * math.prod(left.dims[d] for d in contracted)


def _convolution_flops(
    convolution: Instruction, left: Array, right: Array, *, positions: _Positions
) -> float:
    sources, result_names = convolution.attribute("dim_labels").split("->")
    left_names, right_names = sources.split("_")
    groups = int(convolution.attribute("batch_group_count") or 1)
    result = convolution.results[0]
    products = 2.0 * left.dims[left_names.index("b")] / groups
    products *= right.dims[right_names.index("i")] * right.dims[right_names.index("o")]
    for axis, name in enumerate(sorted(set(result_names) - {"b", "f"})):
        results, inputs = result.dims[result_names.index(name)], left.dims[left_names.index(name)]
        products *= positions(convolution, axis, inputs, results)
    return products


def _dense_positions(convolution: Instruction, axis: int, inputs: int, results: int) -> int:
    """As of a dense convolution of the smaller of input and output: neither holes nor full padding.

    Along an axis of a gradient towards a strided convolution's input, say, there are more
    results than inputs; what lies between the inputs is no work.
    """
    return min(inputs, results) * int(_window(convolution, "size", axis, "1"))


def _real_positions(convolution: Instruction, axis: int, inputs: int, results: int) -> int:
    """Pairs of a result and a place in its window that lie on an input."""
    return window_pairs(
        inputs,
        results,
        size=int(_window(convolution, "size", axis, "1")),
        stride=int(_window(convolution, "stride", axis, "1")),
        before=int(_window(convolution, "pad", axis, "0_0").partition("_")[0]),
        holes=int(_window(convolution, "lhs_dilate", axis, "1")),
        spread=int(_window(convolution, "rhs_dilate", axis, "1")),
    )


@functools.cache
def window_pairs(
    inputs: int, results: int, *, size: int, stride: int, before: int, holes: int, spread: int
) -> int:
    """Result i and place k of the window meet input j where `i * stride + k * spread - before`
    is `j * holes`."""
    count = 0
    for place in range(size):
        offset = before - place * spread
        # Of the results from first to last, each `step`-th meets an input.
        common = math.gcd(stride, holes)
        if offset % common:
            continue
        step = holes // common
        start = next(i for i in range(step) if (i * stride - offset) % holes == 0)
        low = max(0, -(-offset // stride))
        high = min(results - 1, (offset + (inputs - 1) * holes) // stride)
        first = low + (start - low) % step
        count += max(0, (high - first) // step + 1)
    return count


def _window(convolution: Instruction, key: str, axis: int, default: str) -> str:
    found = re.search(rf"(?:^|\s){key}=([\w\-]+)", convolution.braced("window"))
    return found[1].split("x")[axis] if found else default


def kernel_flops(module: Module) -> float:
    """FLOPs that the kernels of a program say of themselves."""
    works = (
        (instruction.kernel_work, times)
        for computation, times in module.runs()
        for instruction in computation.instructions
    )
    return sum(times * work[0] for work, times in works if work is not None)


CyclesOf = Callable[[Instruction], "int | None"]


def compilers(instruction: Instruction) -> int | None:
    """The compiler's own estimate of an operation, if it gives one."""
    return instruction.cycles


def cycles(
    module: Module, cycles_of: CyclesOf = compilers
) -> tuple[dict[Place, int], dict[str, int]]:
    """The estimates by place; and how many operations have none, by opcode."""
    estimated: collections.Counter[Place] = collections.Counter()
    without: collections.Counter[str] = collections.Counter()
    for computation, times in module.runs():
        for instruction in computation.instructions:
            if instruction.opcode in _FREE:
                continue
            count = cycles_of(instruction)
            if count is not None:
                estimated[_main_place(instruction, module)] += times * count
            elif not _is_scalar(instruction):
                without[_kind(instruction)] += times
    return dict(estimated), dict(without)


def dearest(
    module: Module, count: int, cycles_of: CyclesOf = compilers
) -> list[tuple[Instruction, Place, int]]:
    """The `count` operations with the highest estimates: each with its place and its cycles."""
    estimated = [
        (instruction, times * cycles)
        for computation, times in module.runs()
        for instruction in computation.instructions
        if instruction.opcode not in _FREE and (cycles := cycles_of(instruction)) is not None
    ]
    largest = heapq.nlargest(count, estimated, key=lambda one: one[1])
    return [(one, _main_place(one, module), cycles) for one, cycles in largest]


def _is_scalar(instruction: Instruction) -> bool:
    return all(array.elements == 1 for array in instruction.results)


def _kind(instruction: Instruction) -> str:
    return f"{instruction.opcode} {instruction.target}".rstrip()


def _main_place(instruction: Instruction, module: Module) -> Place:
    """Where the heaviest part of an operation came from; a fusion may join several modules."""
    inner = module.inner(instruction)
    if inner is None:
        return place_of(instruction.op_name)
    parts = [part for inside in _fused(inner, module) for part in inside.instructions]
    products = [p.op_name for p in parts if p.opcode in ("convolution", "dot") and p.op_name]
    if products or instruction.op_name:
        return place_of([*products, instruction.op_name][0])
    named = collections.Counter(part.op_name for part in parts if part.op_name)
    return place_of(named.most_common(1)[0][0] if named else "")


def _fused(computation: Computation, module: Module) -> Iterator[Computation]:
    """A computation and those of the fusions in it."""
    yield computation
    for instruction in computation.instructions:
        inner = module.inner(instruction)
        if inner is not None:
            yield from _fused(inner, module)


def collectives(module: Module) -> list[Collective]:
    """Every collective of a step. One that is split over several operations counts once."""
    found: dict[str, Collective] = {}
    for computation, times in module.runs():
        for inside in _fused(computation, module):
            for instruction in inside.instructions:
                if instruction.opcode.removesuffix("-start") in COLLECTIVES:
                    key = instruction.attribute("channel_id") or instruction.name
                    found[key] = _collective(instruction, inside, times)
    return list(found.values())


def _collective(instruction: Instruction, computation: Computation, times: int) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    operands = [computation.by_name[name] for name in instruction.operands]
    size = sum(array.bytes for operand in operands for array in operand.results)
    group = _group(instruction.attributes)
    return Collective(
        kind=kind,
        bytes=size * group if kind == "all-gather" else size,
        group=group,
        times=times,
        place=place_of(instruction.op_name),
    )


def _group(attributes: str) -> int:
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    return 2  # pairs of a collective-permute


def memory_bytes(module: Module) -> float:
    """Bytes that a step moves to and from main memory; what stays on the chip is left out."""
    total = 0.0
    for computation, times in module.runs():
        for instruction in computation.instructions:
            if instruction.opcode not in _FREE:
                total += times * _traffic(instruction, computation, module)
    return total


def _traffic(instruction: Instruction, computation: Computation, module: Module) -> int:
    inner, results = module.inner(instruction), instruction.results
    if instruction.opcode.endswith("-done"):
        return 0
    if instruction.opcode in ("copy-start", *(f"{kind}-start" for kind in COLLECTIVES)):
        results = results[:1]
    elif instruction.opcode == "slice-start":
        results = results[1:2]
    if inner is None:
        return _plain_traffic(instruction, computation, results)
    parameters = inner.parameters()
    read = sum(
        _read_bytes(computation.by_name[name].results, parameters.get(number), inner)
        for number, name in enumerate(instruction.operands)
    )
    return read + _written_bytes(results, inner)


def _plain_traffic(
    instruction: Instruction, computation: Computation, results: tuple[Array, ...]
) -> int:
    operands = [computation.by_name[name].results for name in instruction.operands]
    if instruction.opcode in _SLICES:
        return _main(results) + _part(results, of=operands[0])
    if instruction.opcode == "dynamic-update-slice":
        return _main(operands[1]) + _part(operands[1], of=results)
    return _main(results) + sum(_main(operand) for operand in operands)


def _part(part: tuple[Array, ...], *, of: tuple[Array, ...]) -> int:
    """Bytes of a part of what lies in main memory; 0 if it lies on the chip."""
    return sum(array.bytes for array in part) if _main(of) else 0


def _main(shape: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in shape if array.space == 0)


def _read_bytes(shape: tuple[Array, ...], parameter: Instruction | None, inner: Computation) -> int:
    """Bytes that a fusion reads of an operand: only slices, if slices are all that it takes."""
    whole = _main(shape)
    if parameter is None or not whole:
        return whole
    users = inner.users(parameter.name)
    if users and all(user.opcode in _SLICES for user in users):
        return min(whole, sum(array.bytes for user in users for array in user.results))
    updated = [user for user in users if user.opcode == "dynamic-update-slice"]
    if updated and len(updated) == len(users):
        return 0 if all(user.operands[0] == parameter.name for user in users) else whole
    return whole


def _written_bytes(results: tuple[Array, ...], inner: Computation) -> int:
    root = inner.root
    roots = [inner.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(results):
        return _main(results)
    written = 0
    for array, made in zip(results, roots, strict=True):
        if made.opcode == "dynamic-update-slice" and array.space == 0:
            written += inner.by_name[made.operands[1]].results[0].bytes
        else:
            written += _main((array,))
    return written
