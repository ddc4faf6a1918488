"""What a run has come to: events in, scalar points and the figures of result.json out.

`Tally.take` is the only place that maps an event to tags and values; TensorBoard and
metrics.jsonl both write what it returns, so that they cannot differ. It knows nothing of
files.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from runner.observe.figures import Compiles, StepMeans, StepTimes, step_means
from runner.record.events import (
    CheckpointSaved,
    Compiled,
    Ended,
    Evaluated,
    Event,
    Phase,
    Planned,
    Preflighted,
    Started,
    Steps,
)
from runner.record.outcome import Goodput, Result, Throughput
from runner.record.preflight import PreflightReport, report_from_json


@dataclasses.dataclass(frozen=True)
class Point:
    """Scalars of one moment.

    Attributes:
        step: Completed optimizer updates.
        time: Seconds since the epoch.
        values: Tag to value.
    """

    step: int
    time: float
    values: dict[str, float]


class Tally:
    """Follows a run through all its attempts.

    Args:
        earlier: Figures of the run so far, if another process began it. Its step times are
            not known one by one: medians are those of this process's steps.
        clock: Monotonic seconds.
        now: Seconds since the epoch.
    """

    def __init__(
        self,
        *,
        earlier: Result | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.compiles = Compiles()
        self.steps = 0
        self._times = StepTimes()
        self._clock, self._now = clock, now
        self._began = self._last_event = clock()
        self._attempts = 0
        self._devices = 1
        self._flops_per_step: float | None = None
        self._peak: float | None = None
        self._examples_per_step = self._tokens_per_step = 0
        self._first_step_s: float | None = None
        self._shown_compiles = 0
        self._compile_s_before_eval = 0.0
        self._checkpoint_s = self._eval_s = self._lost_s = 0.0
        self._train: tuple[int, dict[str, float]] = (0, {})
        self._eval: tuple[int, dict[str, float]] = (0, {})
        self._productive_s = self._data_s = self._earlier_s = 0.0
        self._step_s = 0.0
        if earlier is not None:
            self._go_on_from(earlier)
        self._preflight: PreflightReport | None = None

    def take(self, event: Event) -> Point | None:
        """Count an event in; returns its scalars if it has any."""
        values: dict[str, float] = {}
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Planned):
            self._flops_per_step = event.flops_per_step
            self._peak = event.peak_flops_per_s
        elif isinstance(event, Phase):
            self._compile_s_before_eval = self.compiles.total_s
        elif isinstance(event, Compiled):
            self.compiles.add(event.graph)
        elif isinstance(event, Steps):
            values = self._take_steps(event)
        elif isinstance(event, Evaluated):
            values = self._take_evaluation(event)
        elif isinstance(event, CheckpointSaved):
            self._checkpoint_s += event.seconds
        elif isinstance(event, Preflighted):
            self._preflight = report_from_json(event.report)
            values = self._preflight.figures()
        elif isinstance(event, Ended):
            self.steps = max(self.steps, event.step)
        self._last_event = self._clock()
        return Point(self.steps, self._now(), values) if values else None

    def fill(self, outcome: Result) -> Result:
        """`outcome` with every figure that comes from events."""
        preflight = self._preflight
        return dataclasses.replace(
            outcome,
            steps=self.steps,
            compile=self.compiles.figures(),
            step=self._times.figures(),
            throughput=self._throughput(),
            mfu=self._mfu(self._times.time_s / len(self._times)) if self._times else None,
            goodput=self._goodput(),
            final={**self._train[1], **self._eval[1], **(preflight.figures() if preflight else {})},
            preflight=preflight.to_json() if preflight else None,
        )

    def _go_on_from(self, earlier: Result) -> None:
        good = earlier.goodput
        self.compiles = Compiles.of(earlier.compile)
        self.steps = earlier.steps
        self._checkpoint_s, self._eval_s = good.checkpoint_s, good.eval_s
        self._lost_s = good.lost_s
        self._productive_s, self._data_s = good.productive_s, good.data_s
        self._earlier_s = sum(attempt.seconds for attempt in earlier.attempts)
        self._step_s = (earlier.step.median_ms or 0.0) / 1e3
        final = earlier.final
        evaluated = {tag: value for tag, value in final.items() if tag.startswith("eval/")}
        trained = {tag: value for tag, value in final.items() if tag not in evaluated}
        self._train, self._eval = (earlier.steps, trained), (earlier.steps, evaluated)

    def _start(self, event: Started) -> None:
        if self._attempts:
            self._lost_s += self._clock() - self._last_event
            self._lost_s += self._times.drop_after(event.first_step)
            self.compiles.restart()
        else:  # Steps of an earlier process that are repeated: what one took then, for each.
            repeated_s = max(0, self.steps - event.first_step) * self._step_s
            repeated_s = min(repeated_s, self._productive_s)
            self._productive_s -= repeated_s
            self._lost_s += repeated_s
        self._attempts += 1
        self._devices = event.devices
        self._first_step_s = None
        self.steps = event.first_step
        if self._train[0] > event.first_step:
            self._train = (0, {})
        if self._eval[0] > event.first_step:
            self._eval = (0, {})

    def _take_steps(self, event: Steps) -> dict[str, float]:
        if self._first_step_s is None:
            self._first_step_s = event.records[0].time_ms / 1e3
        self.steps = event.records[-1].step
        self._times.add(event.records)
        self.compiles.runtime(event.compile_count, event.compile_s)
        self._examples_per_step = event.examples_per_step
        self._tokens_per_step = event.tokens_per_step
        train = {f"train/{name}": value for name, value in event.metrics.items()}
        self._train = (self.steps, train)
        means = step_means(event.records)
        elapsed_s = self._earlier_s + self._clock() - self._began
        return {
            **train,
            **self._compile_values(),
            "compile/first_step_s": self._first_step_s,
            **(self._step_values(means) if means else {}),
            "memory/device_bytes": event.device_bytes,
            "memory/host_rss_bytes": event.host_rss_bytes,
            "goodput/productive_fraction": min(1.0, self._productive() / elapsed_s)
            if elapsed_s > 0
            else 0.0,
        }

    def _take_evaluation(self, event: Evaluated) -> dict[str, float]:
        compile_s = self.compiles.total_s - self._compile_s_before_eval
        self._eval_s += max(0.0, event.seconds - compile_s)
        self.steps = max(self.steps, event.step)
        values = {f"eval/{name}": value for name, value in event.metrics.items()}
        if self._eval == (event.step, values):
            return {}  # The last evaluation of a run that is gone on with: it is known already.
        self._eval = (event.step, values)
        compiled_meanwhile = self.compiles.count != self._shown_compiles
        return {**values, **(self._compile_values() if compiled_meanwhile else {})}

    def _compile_values(self) -> dict[str, float]:
        self._shown_compiles = self.compiles.count
        return {
            "compile/count": self.compiles.count,
            "compile/total_s": self.compiles.total_s,
            "compile/recompiles": self.compiles.recompiles,
        }

    def _step_values(self, means: StepMeans) -> dict[str, float]:
        values = {
            "step/time_ms": means.time_ms,
            "step/host_ms": means.host_ms,
            "step/data_wait_ms": means.data_wait_ms,
            "step/programs": means.programs,
        }
        seconds = means.time_ms / 1e3
        if seconds > 0:
            values["throughput/examples_per_s"] = self._examples_per_step / seconds
            if self._tokens_per_step:
                values["throughput/tokens_per_s"] = self._tokens_per_step / seconds
        mfu = self._mfu(seconds)
        if mfu is not None:
            values["util/mfu"] = mfu
        return values

    def _mfu(self, step_s: float) -> float | None:
        if not (self._flops_per_step and self._peak and step_s > 0):
            return None
        return self._flops_per_step / (step_s * self._devices * self._peak)

    def _throughput(self) -> Throughput:
        if not self._times.time_s > 0:
            return Throughput()
        steps_per_s = len(self._times) / self._times.time_s
        return Throughput(
            examples_per_s=self._examples_per_step * steps_per_s,
            tokens_per_s=self._tokens_per_step * steps_per_s if self._tokens_per_step else None,
        )

    def _productive(self) -> float:
        return self._productive_s + self._times.productive_s

    def _goodput(self) -> Goodput:
        return Goodput(
            productive_s=self._productive(),
            compile_s=self.compiles.total_s,
            data_s=self._data_s + self._times.wait_s,
            checkpoint_s=self._checkpoint_s,
            eval_s=self._eval_s,
            lost_s=self._lost_s,
        )
