"""What fills the chip's memory: the compiler's buffer assignment, and its report of too much.

Both are text made for people; this module reads them, and nothing else does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from runner.preflight.hlo import own_name

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(.*)$")
_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)\S* @\d+> \(size=(\d+),offset=(\d+)\): (\S+)")
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm\.")
_SINGLE = re.compile(
    r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\) :: #\S+ \[shape = '([^']*)'"
    r".*?tag = '([^@']*)"
)
_PART = re.compile(r"^    ([A-Za-z]\w*(?: \w+)*) +([\d.]+[BKMGT])", re.M)
_OUTPUTS = re.compile(r"Output size ([\d.]+[BKMGT]); shares ([\d.]+[BKMGT]) with arguments")


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Memory that one array takes on a chip.

    Attributes:
        kind: "argument", "result" or "temporary".
        bytes: Its size, padding included.
        shape: Its shape with layout, as the compiler writes it.
        what: An argument's name, or the operation that makes the array.
        source: `file:line` of that operation, or "".
    """

    kind: str
    bytes: int
    shape: str
    what: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Overflow:
    """The compiler's report on a program that is too large.

    Attributes:
        capacity: Bytes that a program may use.
        arguments: Bytes of arguments; 0 where temporaries alone are too much, as the compiler
            gives up before it counts them.
        outputs: Bytes of results, 0 as with arguments.
        aliased: What results take of arguments.
        temporaries: Bytes that live within a step.
        program: Bytes of code and of what else the program brings.
        largest: The largest allocations that it names.
    """

    capacity: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int
    largest: Sequence[Allocation]


def allocations(
    text: str, *, arguments: Sequence[str], operations: Mapping[str, tuple[str, str]]
) -> list[Allocation]:
    """The arrays in main memory, largest first.

    Temporaries may share memory with one another, one after the other.

    Args:
        text: A buffer assignment.
        arguments: The program's arguments in order.
        operations: By instruction, the name of the operation and its `file:line`.
    """
    found: list[Allocation] = []
    header, parameter = "", False
    for line in text.splitlines():
        allocation = _ALLOCATION.match(line)
        if allocation:
            header, parameter = allocation[3], "parameter " in allocation[3]
            continue
        value = _VALUE.match(line)
        if value is None or "color" in header or "thread-local" in header:
            continue
        if parameter:  # What takes an argument's memory later on is no allocation of its own.
            found.append(_argument(header, value, arguments))
            header = "thread-local"
        else:
            found.append(_made(header, value, operations))
    return sorted(dict.fromkeys(found), key=lambda one: -one.bytes)


def _argument(header: str, value: re.Match[str], arguments: Sequence[str]) -> Allocation:
    number = re.search(r"parameter (\d+)", header)
    assert number is not None
    return Allocation("argument", int(value[2]), value[4], arguments[int(number[1])])


def _made(
    header: str, value: re.Match[str], operations: Mapping[str, tuple[str, str]]
) -> Allocation:
    name, size, _, shape = value.groups()
    kind = "result" if "maybe-live-out" in header else "temporary"
    what, source = operations.get(name, ("", ""))
    return Allocation(kind, int(size), shape, what or name, source)


def overflow(report: str) -> Overflow | None:
    """The numbers of a report of too much memory, or None if it is not such a report."""
    single = _SINGLE.search(report)
    if single is not None:
        one = Allocation("temporary", int(single[1]), single[3], single[4], "")
        return Overflow(int(single[2]), 0, 0, 0, one.bytes, 0, [one])
    used = _USED.search(report)
    if used is None:
        return None
    parts = {name: size(amount) for name, amount in _PART.findall(report)}
    outputs = _OUTPUTS.search(report)
    temporaries = parts.get("HLO temp", 0)
    return Overflow(
        capacity=size(used[2]),
        arguments=parts.get("arguments", 0),
        outputs=size(outputs[1]) if outputs else 0,
        aliased=size(outputs[2]) if outputs else 0,
        temporaries=temporaries,
        program=max(0, parts.get("program", 0) - temporaries),
        largest=[_reported(part) for part in re.split(r"^  \d+\. ", report, flags=re.M)[1:]],
    )


def _reported(text: str) -> Allocation:
    fields = dict(re.findall(r"^ *([A-Z][\w ]*): (.*)$", text, re.M))
    operator = fields.get("Operator", "")
    name = re.search(r'op_name="([^"]*)"', operator)
    file = re.search(r'source_file="([^"]*)" source_line=(\d+)', operator)
    return Allocation(
        kind=fields.get("Allocation type", "temporary"),
        bytes=size(fields.get("Size", "0")),
        shape=fields.get("Shape", ""),
        what=own_name(name[1]) if name else fields.get("XLA label", "").partition(" = ")[0],
        source=f"{file[1]}:{file[2]}" if file else "",
    )


def size(text: str) -> int:
    """Bytes of "20.00G", "258.00M" or "512B"."""
    found = re.match(r"([\d.]+)([KMGT]?)", text.strip())
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0
