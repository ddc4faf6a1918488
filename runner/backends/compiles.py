"""The record of what was compiled, when, and why.

Backends open a `CompileLog.watch` around whatever may compile. The log asks the runtime how
much XLA compiled meanwhile, explains compiles after warm-up, and refuses them when strict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from runner.record.errors import BackendError
from runner.record.events import GraphRecord

Signature = tuple[str, ...]


@dataclasses.dataclass
class Watch:
    """What a backend tells of a graph while it is being compiled."""

    nodes: int = 0
    hash: str = ""
    passes: dict[str, int] = dataclasses.field(default_factory=dict)


class CompileLog:
    """Collects a `GraphRecord` for every compiled graph.

    Args:
        on_record: Called with each record as it is made.
        on_start: Called with a graph's role when its compile is about to start.
        totals: Compiles so far and their seconds, as the runtime counts them.
        strict: Whether a recompile raises.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        on_record: Callable[[GraphRecord], None] = lambda record: None,
        *,
        on_start: Callable[[str], None] = lambda role: None,
        totals: Callable[[], tuple[int, float]] = lambda: (0, 0.0),
        strict: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.records: list[GraphRecord] = []
        self.step = 0
        self._on_record = on_record
        self._on_start = on_start
        self._totals = totals
        self._strict = strict
        self._clock = clock
        self._signatures: dict[str, Signature] = {}
        self._warm: set[str] = set()

    @contextlib.contextmanager
    def watch(self, role: str, inputs: Sequence[Any], *, certain: bool = False) -> Iterator[Watch]:
        """Record the compile that happens inside, if one does.

        Args:
            role: The graph's role, see `GraphRecord`.
            inputs: The graph's inputs, whose shapes and types explain a recompile.
            certain: Whether a graph is known to be new. It, and the first one of a role, is
                put on record even if XLA has compiled the same before and takes no time.

        Raises:
            BackendError: It was a recompile and the log is strict.
        """
        count, xla_s = self._totals()
        if certain or role not in self._warm:
            self._on_start(role)
        start = self._clock()
        watch = Watch()
        yield watch
        seconds = self._clock() - start
        new_count, new_xla_s = self._totals()
        if certain or new_count > count or role not in self._warm:
            spent = new_xla_s - xla_s
            self._record(role, inputs, watch=watch, trace_s=max(seconds - spent, 0.0), xla_s=spent)

    def warmed(self, role: str) -> None:
        """A graph of this role is ready: any further compile of the role is a recompile."""
        self._warm.add(role)

    def _record(
        self, role: str, inputs: Sequence[Any], *, watch: Watch, trace_s: float, xla_s: float
    ) -> None:
        signature = tuple(describe(value) for value in inputs)
        recompile = role in self._warm
        record = GraphRecord(
            role=role,
            nodes=watch.nodes,
            trace_s=trace_s,
            xla_s=xla_s,
            hash=watch.hash,
            bytes=sum(v.numel() * v.element_size() for v in inputs if isinstance(v, Tensor)),
            step=self.step,
            cause=self._cause(role, signature) if recompile else "first call",
            recompile=recompile,
            passes=watch.passes,
        )
        self._signatures[role] = signature
        self.records.append(record)
        self._on_record(record)
        if recompile and self._strict:
            raise BackendError(
                f"strict allows no recompile after warm-up, because each stops the device: "
                f"the {role} graph was compiled again at step {self.step}: {record.cause}"
            )

    def _cause(self, role: str, signature: Signature) -> str:
        old = self._signatures.get(role)
        if old is None:
            return "a graph of this role that had not been needed before"
        if len(old) != len(signature):
            return f"number of inputs changed: {len(old)} -> {len(signature)}"
        changed = [
            f"input {position}: {before} -> {after}"
            for position, (before, after) in enumerate(zip(old, signature, strict=True))
            if before != after
        ]
        if not changed:
            return "same input shapes and types: a Python value in the model's code changed"
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        return "; ".join(changed[:3]) + more


def describe(value: Any) -> str:
    """A graph input in a few words: type and shape of a tensor, value of a number."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)
