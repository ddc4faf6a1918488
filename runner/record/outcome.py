"""What became of a run: its state, its exit code and the figures of `result.json`.

This module owns the schema of `result.json` (schema 1). It does not know how the figures
are gathered (`runner.observe`) nor when the file is written (`runner.batch`).
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from runner.record.errors import ExitCode

SCHEMA = 1


class State(str, enum.Enum):
    """Where a run stands."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    PREEMPTED = "preempted"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the run by itself."""
        return self not in (State.PENDING, State.RUNNING)


def state_of(exit_code: int) -> State:
    """The state that a run with this exit code has ended in."""
    if exit_code == ExitCode.DONE:
        return State.SUCCEEDED
    if exit_code == ExitCode.HANG:
        return State.TIMED_OUT
    if exit_code == ExitCode.PREEMPTED:
        return State.PREEMPTED
    return State.CANCELLED if exit_code == ExitCode.INTERRUPTED else State.FAILED


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One child process's try at the run."""

    cause: str
    exit_code: int
    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class CompileFigures:
    """Seconds and counts of everything that was compiled.

    `count` is what the XLA runtime counted; `graphs` are the records that backends left.
    """

    count: int = 0
    total_s: float = 0.0
    trace_s: float = 0.0
    xla_s: float = 0.0
    recompiles: int = 0
    graphs: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class StepFigures:
    """Times of the steps that did not compile, in milliseconds; None before the first."""

    median_ms: float | None = None
    p95_ms: float | None = None
    host_median_ms: float | None = None
    data_wait_median_ms: float | None = None
    programs_per_step: float | None = None


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Examples (images, sequences) per second of time in which steps ran."""

    examples_per_s: float | None = None
    tokens_per_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the run's wall-clock seconds went."""

    productive_s: float = 0.0
    compile_s: float = 0.0
    data_s: float = 0.0
    checkpoint_s: float = 0.0
    eval_s: float = 0.0
    lost_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """The whole of `result.json`."""

    job: str
    backend: str
    state: State = State.PENDING
    exit_code: int | None = None
    reason: str = ""
    schema: int = SCHEMA
    attempts: list[Attempt] = dataclasses.field(default_factory=list)
    steps: int = 0
    compile: CompileFigures = dataclasses.field(default_factory=CompileFigures)
    step: StepFigures = dataclasses.field(default_factory=StepFigures)
    throughput: Throughput = dataclasses.field(default_factory=Throughput)
    mfu: float | None = None
    goodput: Goodput = dataclasses.field(default_factory=Goodput)
    final: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        plain = dataclasses.asdict(self)
        plain["state"] = self.state.value
        return plain
