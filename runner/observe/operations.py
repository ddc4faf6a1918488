"""What a trace's operations cost, and which module of the model each comes from."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from runner.observe.xplane import TraceEvent, XPlane

#: `phase/module.number/operation`, as `runner.backends.step.labels` and torch_xla make it.
_LABEL = re.compile(
    r"(?:^|/)(forward|backward|recompute|optimizer|step)(?:/([^/]*?))?\.\d+/",
)
_PRODUCTS = ("convolution", "dot", "custom-call")


@dataclasses.dataclass(frozen=True)
class OperationCost:
    """An operation of a compiled program.

    Attributes:
        name: XLA's name for it.
        opcode: Such as "fusion".
        phase: "forward", "backward", ... or "" where the program bears no labels.
        module: Dotted path of the model's module, or "".
        runs: How often it ran in the trace.
        total_ms: In all of them.
    """

    name: str
    opcode: str
    phase: str
    module: str
    runs: int
    total_ms: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a whole trace.

    Attributes:
        operations: Dearest first.
        calls: Calls of the training step.
    """

    operations: list[OperationCost]
    calls: int

    @property
    def total_ms(self) -> float:
        """Of all operations; those that ran side by side count each."""
        return sum(operation.total_ms for operation in self.operations)


def costs_of(trace: XPlane) -> Costs:
    """The cost of each operation in a trace of XLA's CPU device."""
    ends = {e.stats["_c"]: e for e in trace.events if e.name.startswith("end: ")}
    spent: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in trace.events:
        if "hlo_op" in event.stats:
            key = (str(event.stats["hlo_module"]), str(event.stats["hlo_op"]))
            spent[key].append(_duration_ms(event, ends.get(event.stats.get("_p"))))
    programs = {name: _Program(module) for name, module in trace.modules.items()}
    operations = [
        programs[module].cost(name, times)
        for (module, name), times in spent.items()
        if module in programs and not programs[module].holds(name, spent, module)
    ]
    operations.sort(key=lambda operation: -operation.total_ms)
    return Costs(operations, sum("step_num" in event.stats for event in trace.events))


def _duration_ms(event: TraceEvent, end: TraceEvent | None) -> float:
    """An operation that goes on in other threads has an event of its own for its end."""
    stop_ns = event.start_ns + event.duration_ns
    if end is not None:
        stop_ns = max(stop_ns, end.start_ns)
    return (stop_ns - event.start_ns) / 1e6


class _Program:
    """The instructions of a compiled module."""

    def __init__(self, module: Any) -> None:
        self._computations = {part.id: part.instructions for part in module.computations}
        self._by_name = {i.name: i for part in module.computations for i in part.instructions}

    def holds(self, name: str, spent: dict[tuple[str, str], list[float]], module: str) -> bool:
        """Whether operations inside of this one, a loop's say, are in the trace themselves."""
        return any((module, inner.name) in spent for inner in self._inside(name))

    def cost(self, name: str, times: Sequence[float]) -> OperationCost:
        instruction = self._by_name.get(name)
        opcode = instruction.opcode if instruction is not None else ""
        phase, module = self._place(name)
        return OperationCost(name, opcode, phase, module, len(times), sum(times))

    def _inside(self, name: str) -> Iterator[Any]:
        if name in self._by_name:
            for number in self._by_name[name].called_computation_ids:
                for inner in self._computations.get(number, ()):
                    yield inner
                    yield from self._inside(inner.name)

    def _place(self, name: str) -> tuple[str, str]:
        """Where the heaviest part of an operation came from; a fusion may join several modules."""
        if name not in self._by_name:
            return "", ""
        parts = [self._by_name[name], *self._inside(name)]
        labels = [
            (part.opcode, match.groups(""))
            for part in parts
            if (match := _LABEL.search(part.metadata.op_name))
        ]
        for opcode, (phase, module) in labels:
            if opcode in _PRODUCTS:
                return phase, module
        if not labels:
            return "", ""
        ((phase, module), _), *_ = collections.Counter(label for _, label in labels).most_common(1)
        return phase, module
