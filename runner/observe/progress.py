"""What a display says of a run: phase, step, figures and time left, as plain words."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from runner.observe.metrics import Point
from runner.record.events import (
    Compiled,
    Evaluated,
    Event,
    GraphRecord,
    Phase,
    Planned,
    Profiled,
    Started,
    Steps,
)

#: Weight of the newest step time in the one that time left is reckoned with.
_NEWEST = 0.1


class Progress:
    """Follows a run for a display.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.step = 0
        self.steps = 0
        self.phase = "starting"
        self._clock = clock
        self._phase_began = clock()
        self._values: dict[str, float] = {}
        self._step_ms: float | None = None

    def take(self, event: Event, point: Point | None) -> None:
        """Count an event in."""
        if isinstance(event, Started):
            self.step = event.first_step
            self._values, self._step_ms = {}, None
            self._enter("building")
        elif isinstance(event, Phase):
            self._enter(f"{event.name} {event.detail}".rstrip())
        elif isinstance(event, Planned):
            self.steps = event.steps
        elif isinstance(event, Steps) and point is not None:
            self._take_steps(point)

    @property
    def training(self) -> bool:
        """Whether steps go by, so that a bar says more than a clock."""
        return self.phase == "training" and bool(self._values)

    @property
    def loss(self) -> float | None:
        """The newest loss."""
        return self._values.get("train/loss")

    @property
    def examples_per_s(self) -> float | None:
        """The newest throughput."""
        return self._values.get("throughput/examples_per_s")

    @property
    def left_s(self) -> float | None:
        """Seconds that the steps to come will take, if they are like the latest."""
        if self._step_ms is None or self.steps <= self.step:
            return None
        return (self.steps - self.step) * self._step_ms / 1e3

    def phase_line(self) -> str:
        """The phase and how long it has gone on."""
        phase = self.phase
        if phase == "training":
            phase = "first step: compiling"
        return f"{phase}  {duration(self._clock() - self._phase_began)}"

    def figures(self) -> list[str]:
        """Loss, rate, speed and time left, the most telling first."""
        values, parts = self._values, []
        for tag, form in (
            ("train/loss", "loss {:.4f}"),
            ("train/lr", "lr {:.3g}"),
            ("throughput/examples_per_s", "{:,.0f} examples/s"),
            ("step/time_ms", "{:.1f} ms/step"),
        ):
            if tag in values:
                parts.append(form.format(values[tag]))
        if self.left_s is not None:
            parts.append(f"{duration(self.left_s)} left")
        return parts

    def _take_steps(self, point: Point) -> None:
        self.step = point.step
        self._values = point.values
        if self.phase != "training":
            self._enter("training")
        newest = point.values.get("step/time_ms")
        if newest is not None and math.isfinite(newest):
            before = newest if self._step_ms is None else self._step_ms
            self._step_ms = before + _NEWEST * (newest - before)

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self._phase_began = self._clock()


def duration(seconds: float) -> str:
    """Seconds as "12 s", "3:05" or "1:02:03"."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def started_line(event: Started) -> str:
    """What a worker runs on."""
    devices = f"{event.devices} x {event.device}" if event.devices > 1 else event.device
    resumed = f", from step {event.first_step}" if event.first_step else ""
    return f"started on {devices} (process {event.pid}){resumed}"


def compiled_line(graph: GraphRecord) -> str:
    """What was compiled, how long it took and, of a recompile, why."""
    what = f"recompiled at step {graph.step}" if graph.recompile else "compiled"
    why = f": {graph.cause}" if graph.recompile else ""
    nodes = f"{graph.nodes:,} nodes, " if graph.nodes else ""
    return f"{what} {graph.role}: {nodes}trace {graph.trace_s:.1f} s, XLA {graph.xla_s:.1f} s{why}"


def evaluated_line(event: Evaluated) -> str:
    """The metrics of an evaluation."""
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
    return f"eval at step {event.step}: {metrics}  ({event.examples:,} examples)"


def profiled_line(event: Profiled) -> str:
    """Which updates a profile shows, and where it is."""
    return f"profile of updates {event.first_step} to {event.last_step}: {event.folder}"


def message_of(event: Event) -> str | None:
    """The line that an event is worth wherever it is shown, if it is worth one."""
    if isinstance(event, Started):
        return started_line(event)
    if isinstance(event, Compiled):
        return compiled_line(event.graph)
    if isinstance(event, Evaluated):
        return evaluated_line(event)
    if isinstance(event, Profiled):
        return profiled_line(event)
    return None
