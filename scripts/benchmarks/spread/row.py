"""What is measured of one job over one mesh."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collective operations of a kind in a step.

    Attributes:
        kind: Such as "all-reduce".
        count: How many run in a step.
        bytes: Of the whole arrays that a device ends or begins with, whichever are larger.
        wire_bytes: What a device sends, by the ring algorithm.
    """

    kind: str
    count: int
    bytes: int
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class Row:
    """The figures of a job over so many devices.

    Attributes:
        parallel: How it is spread over them: `parallel.name`.
        devices: How many.
        error: Why there are no figures, or None.
        step_ms: Median over rounds of a burst's time over its updates.
        programs_per_step: Device programs that an update starts.
        recompiles: Programs compiled after the first update.
        state_bytes: Of the largest device: parameters, buffers and optimizer state.
        losses: Of the first updates.
        collectives: By kind, as the compiled program of a device has them.
    """

    parallel: str
    devices: int
    error: str | None = None
    step_ms: float | None = None
    programs_per_step: float | None = None
    recompiles: int | None = None
    state_bytes: int | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
