"""HLO text as instructions: parsing, and how often each computation runs.

Knows the syntax of XLA's printer and nothing of what the numbers are for.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "f4e2m1fn": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_LAYOUT = re.compile(r"\{([\d,]*):T\(([\d,]+)\)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.\-]+)")


def own_name(op_name: str) -> str:
    """The name of an operation without those of what it is called by.

    In a loop that is `.../call.<number>/<own name>`; what the loop itself does has the loop's.
    """
    name = re.sub(r"^.*/call\.\d+/", "", op_name)
    return re.sub(r"/scan/[\w\-]+\.\d+$", "/scan", name)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
        dtype: Such as "bf16".
        dims: Its dimensions.
        space: Memory space; 0 is the chip's main memory, all others are on the chip.
        order: Its dimensions from the minor to the major one; empty where it is not told.
        tile: What the minor dimensions are padded to multiples of, the minor one last.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding; 0 for tokens and other shapes without data."""
        return self._bytes_of(self.elements)

    @property
    def padded_bytes(self) -> int:
        """Bytes that it takes in memory."""
        if not self.tile:
            return self.bytes
        sizes = [self.dims[axis] for axis in reversed(self.order)]
        sizes = [1] * (len(self.tile) - len(sizes)) + sizes
        first = len(sizes) - len(self.tile)
        padded = [math.ceil(n / t) * t for n, t in zip(sizes[first:], self.tile, strict=True)]
        return self._bytes_of(math.prod(sizes[:first]) * math.prod(padded))

    def _bytes_of(self, elements: int) -> int:
        bits = 8 if self.dtype.startswith("f8") else _BITS.get(self.dtype, 0)
        return math.ceil(elements * bits / 8)


@functools.lru_cache(maxsize=65536)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, a tuple's in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype in _BITS or dtype.startswith("f8"):
            space = _SPACE.search(layout)
            placed = _LAYOUT.search(layout)
            found.append(
                Array(
                    dtype,
                    _numbers(dims),
                    space=int(space[1]) if space else 0,
                    order=_numbers(placed[1]) if placed else (),
                    tile=_numbers(placed[2]) if placed else (),
                )
            )
    return tuple(found)


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of "8,<=128"; a bound stands for the size that it bounds."""
    return tuple(int(part.strip("<= ")) for part in text.split(",") if part.strip("<= "))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Its name, unique in the module.
        shape: Its result's shape, as text.
        opcode: Such as "fusion".
        operands: Names of its operands.
        arguments: What stands in the parentheses, as text: a constant's value, say.
        attributes: What follows the operands, as text.
        root: Whether it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def results(self) -> tuple[Array, ...]:
        """The arrays of its result."""
        return arrays(self.shape)

    @property
    def op_name(self) -> str:
        """The name in its metadata, or "": see `own_name`."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return own_name(found[1]) if found else ""

    @property
    def source(self) -> str:
        """`file:line` in its metadata, or ""."""
        found = re.search(r'source_file="([^"]*)" source_line=(\d+)', self.attributes)
        return f"{found[1]}:{found[2]}" if found else ""

    @property
    def target(self) -> str:
        """The kernel that a custom call names, or ""."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def kernel_work(self) -> tuple[float, float] | None:
        """FLOPs and bytes that a kernel says of itself; None for what is no kernel."""
        found = re.search(r'"cost_estimate":\s*(\{[^{}]*\})', self.attributes)
        if found is None:
            return None
        said = json.loads(found[1])
        return float(said["flops"]), float(said["bytes_accessed"])

    def attribute(self, name: str) -> str:
        """The value of an attribute without braces, such as a computation's name; or ""."""
        found = re.search(rf"\b{name}=%?([^\s,{{}}]+)", self.attributes)
        return found[1] if found else ""

    def braced(self, name: str) -> str:
        """What stands in the braces of an attribute; or ""."""
        found = re.search(rf"\b{name}=\{{([^{{}}]*(?:\{{[^{{}}]*\}}[^{{}}]*)*)\}}", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions in order, and by name."""

    name: str
    instructions: list[Instruction]
    by_name: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """Its result."""
        return next(one for one in reversed(self.instructions) if one.root)

    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(i.arguments): i for i in self.instructions if i.opcode == "parameter"}

    def live(self) -> list[Instruction]:
        """The instructions that the result depends on."""
        needed, waiting = {self.root.name}, [self.root]
        while waiting:
            for name in waiting.pop().operands:
                if name not in needed:
                    needed.add(name)
                    waiting.append(self.by_name[name])
        return [one for one in self.instructions if one.name in needed]

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read an instruction."""
        return [one for one in self.instructions if name in one.operands]


class Module:
    """A parsed module.

    Attributes:
        computations: All of them by name.
        entry: The one that runs.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        current: Computation | None = None
        entry = ""
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header is not None and " = " not in line.split("(", 1)[0]:
                current = Computation(header[2], [], {})
                self.computations[current.name] = current
                entry = current.name if header[1] else entry
            elif current is not None and line.startswith("  "):
                instruction = parse(line)
                current.instructions.append(instruction)
                current.by_name[instruction.name] = instruction
        self.entry = self.computations[entry]

    def runs(self) -> Iterator[tuple[Computation, int]]:
        """Every computation that the entry runs by itself, and how often.

        The insides of fusions and of reductions are not among them.
        """
        waiting = [(self.entry, 1)]
        while waiting:
            computation, times = waiting.pop()
            yield computation, times
            for instruction in computation.instructions:
                waiting += [
                    (self.computations[name], times * count)
                    for name, count in self._called(instruction)
                ]

    def inner(self, instruction: Instruction) -> Computation | None:
        """The computation inside a fusion; None for anything else."""
        if instruction.opcode != "fusion":
            return None
        return self.computations[instruction.attribute("calls")]

    def _called(self, instruction: Instruction) -> list[tuple[str, int]]:
        if instruction.opcode == "while":
            times = self.trips(instruction)
            body, condition = instruction.attribute("body"), instruction.attribute("condition")
            return [(body, times), (condition, times + 1)]
        if instruction.opcode == "conditional":
            branches = _NAME.findall(instruction.braced("branch_computations"))
            return [(name, 1) for name in branches]
        if instruction.opcode in ("call", "async-start"):
            name = instruction.attribute("to_apply") or instruction.attribute("calls")
            return [(name, 1)]
        return []

    def trips(self, loop: Instruction) -> int:
        """How often a loop's body runs; 1 where nothing tells."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.attribute("condition")]
        compare = condition.root
        constants = [
            condition.by_name[name].arguments
            for name in compare.operands
            if condition.by_name[name].opcode == "constant"
        ]
        counts = compare.opcode == "compare" and compare.attribute("direction") in ("LT", "GT")
        return int(constants[0]) if counts and len(constants) == 1 else 1


def parse(line: str) -> Instruction:
    """One line of a computation."""
    text = _COMMENT.sub("", line).strip()
    root = text.startswith("ROOT ")
    name, _, rest = text.removeprefix("ROOT ").partition(" = ")
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end]
    return Instruction(
        name=name.lstrip("%"),
        shape=shape,
        opcode=opcode.strip(),
        operands=tuple(_NAME.findall(inside)),
        arguments=inside,
        attributes=rest[end + 1 :],
        root=root,
    )


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"no closing parenthesis: {text[:120]}")
