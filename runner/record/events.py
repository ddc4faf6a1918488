"""Events: everything that a worker tells its parent, one JSON object a line on a pipe.

Each event is a frozen dataclass; `encode` and `decode` are the wire format. An event says
what happened in the child. What it means for the run is the parent's to decide.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, TypeAlias


@dataclasses.dataclass(frozen=True)
class GraphRecord:
    """One compiled graph.

    Attributes:
        role: "forward", "backward", "step", "eval" or "lazy" (a graph of lazy tensors).
        nodes: Operations in the FX graph; 0 where there is none (lazy tensors).
        trace_s: Seconds until the graph was handed to XLA.
        xla_s: Seconds that XLA compiled.
        hash: XLA's hash of the graph, or "" where it is not known.
        bytes: Bytes of the graph's inputs.
        step: Completed optimizer updates when it was compiled.
        cause: Why it was compiled: "first call", or what changed.
        recompile: Whether it was compiled after warm-up.
        passes: What the passes changed: name of a pass to how often.
    """

    role: str
    nodes: int
    trace_s: float
    xla_s: float
    hash: str
    bytes: int
    step: int
    cause: str
    recompile: bool = False
    passes: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Started:
    """The worker is up and has its device."""

    kind: ClassVar[str] = "started"
    pid: int
    device: str
    devices: int
    versions: dict[str, str]
    first_step: int = 0


@dataclasses.dataclass(frozen=True)
class Phase:
    """The worker entered a phase: "building", "compiling", "training", "evaluating", ..."""

    kind: ClassVar[str] = "phase"
    name: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Planned:
    """What the job turned out to be, once built.

    Attributes:
        flops_per_step: Of forward and backward, over all devices; None where nobody counted.
        peak_flops_per_s: Of one device; None where it is unknown.
    """

    kind: ClassVar[str] = "planned"
    steps: int
    parameters: int
    state_bytes: int
    train_examples: int
    eval_examples: int
    flops_per_step: float | None
    peak_flops_per_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A graph was compiled."""

    kind: ClassVar[str] = "compiled"
    graph: GraphRecord


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One completed optimizer update.

    Attributes:
        step: Completed updates, this one included.
        time_ms: From the end of the step before to the end of this one, waits for
            evaluation and checkpoints not counted.
        host_ms: Host time spent in dispatching the step.
        data_wait_ms: Time that the loop waited for its batch.
        programs: Device programs a step, over the last moments.
        compiled: Whether anything was compiled during the step.
        profiled: Whether a trace was taken of it.
    """

    step: int
    time_ms: float
    host_ms: float
    data_wait_ms: float
    programs: float
    compiled: bool
    profiled: bool = False

    @property
    def timed(self) -> bool:
        """Whether the step counts in step-time figures."""
        return not (self.compiled or self.profiled)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps completed since the last such event, oldest first, with the newest's metrics.

    Attributes:
        records: The steps; the last one is the step that `metrics` belong to.
        metrics: Metric name to value at the last step ("loss", "lr", "grad_norm", ...).
        compile_count: XLA compiles so far, as the runtime counts them.
        compile_s: Seconds that XLA compiled so far.
        device_bytes: Bytes held on one device.
        host_rss_bytes: Resident memory of the worker.
        examples_per_step: Examples in a global batch.
        tokens_per_step: Tokens in a global batch, or 0.
    """

    kind: ClassVar[str] = "steps"
    records: list[StepRecord]
    metrics: dict[str, float]
    compile_count: int
    compile_s: float
    device_bytes: int
    host_rss_bytes: int
    examples_per_step: int
    tokens_per_step: int = 0


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One pass over the held-out data.

    Attributes:
        step: Completed updates.
        metrics: Means over all examples.
        examples: How many there are.
        seconds: How long it took.
        texts: What the job shows of the first few: Markdown, by name.
        images: The same: PNG as Base64, by name.
    """

    kind: ClassVar[str] = "evaluated"
    step: int
    metrics: dict[str, float]
    examples: int
    seconds: float
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    images: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Saving:
    """A checkpoint is about to be written: the worker waits until all before is recorded.

    A run that comes back to the checkpoint does not repeat the steps before it, so what is
    known of them must be in files by then, even if the parent is killed.
    """

    kind: ClassVar[str] = "saving"
    step: int


@dataclasses.dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete on disk.

    Attributes:
        step: Completed updates in it.
        path: Where it is.
        bytes: Size of its files.
        seconds: How long training stood still for it.
        write_s: How long it took to write, while training went on.
    """

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str
    bytes: int
    seconds: float
    write_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Profiled:
    """A trace of some updates is complete on disk.

    Attributes:
        first_step: The first update that it shows.
        last_step: The last one.
        folder: The TensorBoard folder that it is in.
        seconds: How long the trace was, with what writing it took.
    """

    kind: ClassVar[str] = "profiled"
    first_step: int
    last_step: int
    folder: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Alive:
    """Something went forward of which no other event tells: a step, a part of a write."""

    kind: ClassVar[str] = "alive"
    step: int


@dataclasses.dataclass(frozen=True)
class Preflighted:
    """The verdict of a preflight: a `PreflightReport` as JSON values."""

    kind: ClassVar[str] = "preflighted"
    report: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Notice:
    """Something that the user should read: `level` is "info" or "warning"."""

    kind: ClassVar[str] = "notice"
    level: str
    message: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """The worker's last word; `fault` is a `Fault`'s value."""

    kind: ClassVar[str] = "ended"
    exit_code: int
    reason: str
    step: int
    fault: str = ""


Event: TypeAlias = (
    Started
    | Phase
    | Planned
    | Compiled
    | Steps
    | Evaluated
    | Saving
    | CheckpointSaved
    | Profiled
    | Alive
    | Preflighted
    | Notice
    | Ended
)

_KINDS: dict[str, type[Any]] = {
    cls.kind: cls
    for cls in (
        Started,
        Phase,
        Planned,
        Compiled,
        Steps,
        Evaluated,
        Saving,
        CheckpointSaved,
        Profiled,
        Alive,
        Preflighted,
        Notice,
        Ended,
    )
}


def encode(event: Event) -> bytes:
    """One event as one line. Non-finite numbers travel as Python's JSON extension."""
    payload = {"kind": event.kind, **dataclasses.asdict(event)}
    return json.dumps(payload, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Event:
    """The event of one line.

    Raises:
        ValueError: The line is not an event (cut short by a killed worker, say).
    """
    try:
        payload = json.loads(line)
        cls = _KINDS[payload.pop("kind")]
        if cls is Compiled:
            payload["graph"] = GraphRecord(**payload["graph"])
        if cls is Steps:
            payload["records"] = [StepRecord(**record) for record in payload["records"]]
        event: Event = cls(**payload)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event: {line[:200]!r}") from error
    return event
