"""What became of a run: its state, its exit code and the figures of `result.json`.

This module owns the schema of `result.json` (schema 1). It does not know how the figures
are gathered (`runner.observe`) nor when the file is written (`runner.batch`).
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from runner.record.errors import ExitCode, Fault

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
    PRUNED = "pruned"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the run by itself."""
        return self not in (State.PENDING, State.RUNNING)

    @property
    def good(self) -> bool:
        """Whether the run came to the end that was wanted of it."""
        return self in (State.SUCCEEDED, State.PRUNED)

    @property
    def colour(self) -> str:
        """How it is shown, in rich's words."""
        return _COLOURS.get(self.value, "red")


_COLOURS = {"succeeded": "green", "pruned": "yellow", "running": "cyan", "pending": "dim"}


def state_of(exit_code: int) -> State:
    """The state that a run with this exit code has ended in."""
    if exit_code == ExitCode.DONE:
        return State.SUCCEEDED
    if exit_code == ExitCode.HANG:
        return State.TIMED_OUT
    if exit_code == ExitCode.PREEMPTED:
        return State.PREEMPTED
    if exit_code == ExitCode.PRUNED:
        return State.PRUNED
    return State.CANCELLED if exit_code == ExitCode.INTERRUPTED else State.FAILED


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One child process's try at the run.

    Attributes:
        cause: Why it ended; empty if all was well.
        exit_code: What the run would have ended with, had it been the last.
        steps: Completed updates of the run at its end.
        seconds: How long it took.
        fault: The `Fault` that ended it.
        first_step: Completed updates that it began with.
        saved_step: The newest checkpoint that it wrote; 0 for none.
        lost_steps: Updates that it made and that no checkpoint holds.
    """

    cause: str
    exit_code: int
    steps: int
    seconds: float
    fault: Fault = Fault.NONE
    first_step: int = 0
    saved_step: int = 0
    lost_steps: int = 0


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
    preflight: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        plain = dataclasses.asdict(self)
        plain["state"] = self.state.value
        for attempt in plain["attempts"]:
            attempt["fault"] = attempt["fault"].value
        return plain


def result_from_json(plain: dict[str, Any]) -> Result:
    """The result that `Result.to_json` was given; keys that are not known are left out.

    Raises:
        ValueError: It is no result of this schema.
    """
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
        raise ValueError(f"not a result of schema {SCHEMA}")
    try:
        sections = {key: _build(cls, plain[key]) for key, cls in _SECTIONS.items() if key in plain}
        attempts = [_build(Attempt, attempt) for attempt in plain.get("attempts", [])]
        result: Result = _build(Result, {**plain, **sections, "attempts": attempts})
        return dataclasses.replace(result, state=State(plain["state"]))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a result: {error}") from error


_SECTIONS: dict[str, type[Any]] = {
    "compile": CompileFigures,
    "step": StepFigures,
    "throughput": Throughput,
    "goodput": Goodput,
}


def _build(cls: type[Any], plain: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    values = {key: value for key, value in plain.items() if key in known}
    if cls is Attempt:
        values["fault"] = Fault(values.get("fault", ""))
    return cls(**values)
