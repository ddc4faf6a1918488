"""Figures that grow with the run: step times and compiles, over all attempts.

Both know what a retry means: steps that will be repeated are taken out, and the runtime's
counters, which begin at zero in every process, are added up. Neither knows of events' order,
of clocks or of files.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from runner.record.events import GraphRecord, StepRecord
from runner.record.outcome import CompileFigures, StepFigures

#: Graph records that are kept for result.json; a recompile storm counts on without them.
GRAPHS_KEPT = 1000


@dataclasses.dataclass(frozen=True)
class StepMeans:
    """Means over some steps that neither compiled nor were profiled."""

    time_ms: float
    host_ms: float
    data_wait_ms: float
    programs: float


def step_means(records: Sequence[StepRecord]) -> StepMeans | None:
    """Means over the steps that neither compiled nor were profiled, or None without any."""
    timed = [record for record in records if record.timed]
    if not timed:
        return None
    return StepMeans(
        time_ms=sum(record.time_ms for record in timed) / len(timed),
        host_ms=sum(record.host_ms for record in timed) / len(timed),
        data_wait_ms=sum(record.data_wait_ms for record in timed) / len(timed),
        programs=sum(record.programs for record in timed) / len(timed),
    )


class StepTimes:
    """Times of the steps that count, 24 bytes a step, ordered by step."""

    def __init__(self) -> None:
        self._steps = array.array("q")
        self._time_ms = array.array("f")
        self._host_ms = array.array("f")
        self._wait_ms = array.array("f")
        self._programs = array.array("f")
        self.time_s = 0.0
        self.wait_s = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def productive_s(self) -> float:
        """Seconds in which steps ran and did not wait for data."""
        return max(0.0, self.time_s - self.wait_s)

    def add(self, records: Sequence[StepRecord]) -> None:
        """Take completed steps; those that compiled or were profiled are left out."""
        for record in records:
            if not record.timed:
                continue
            self._steps.append(record.step)
            self._time_ms.append(record.time_ms)
            self._host_ms.append(record.host_ms)
            self._wait_ms.append(record.data_wait_ms)
            self._programs.append(record.programs)
            self.time_s += record.time_ms / 1e3
            self.wait_s += record.data_wait_ms / 1e3

    def drop_after(self, step: int) -> float:
        """Take out the steps after `step`, which will be repeated; returns their seconds."""
        position = bisect.bisect_right(self._steps, step)
        before_s = self.time_s
        for column in (self._time_ms, self._host_ms, self._wait_ms, self._programs):
            del column[position:]
        del self._steps[position:]
        self.time_s = float(np.sum(self._time_ms, dtype=np.float64)) / 1e3
        self.wait_s = float(np.sum(self._wait_ms, dtype=np.float64)) / 1e3
        return max(0.0, before_s - self.time_s)

    def figures(self) -> StepFigures:
        """Medians, 95th percentile and the mean number of programs."""
        if not self._steps:
            return StepFigures()
        return StepFigures(
            median_ms=float(np.median(self._time_ms)),
            p95_ms=float(np.percentile(self._time_ms, 95)),
            host_median_ms=float(np.median(self._host_ms)),
            data_wait_median_ms=float(np.median(self._wait_ms)),
            programs_per_step=float(np.mean(self._programs, dtype=np.float64)),
        )


class Compiles:
    """Compiles as the runtime counts them, with the records that backends left.

    A record arrives before the runtime's next count does, so records since the last count
    are added to it.
    """

    def __init__(self) -> None:
        self.graphs: list[dict[str, Any]] = []
        self.records = 0
        self.recompiles = 0
        self.trace_s = 0.0
        self._earlier = (0, 0.0)
        self._runtime = (0, 0.0)
        self._since = (0, 0.0)

    @classmethod
    def of(cls, figures: CompileFigures) -> Compiles:
        """Compiles that go on from the figures of an earlier process."""
        compiles = cls()
        compiles.graphs = list(figures.graphs)
        compiles.records = len(figures.graphs)
        compiles.recompiles, compiles.trace_s = figures.recompiles, figures.trace_s
        compiles._earlier = (figures.count, figures.xla_s)
        return compiles

    @property
    def count(self) -> int:
        """Compiles of all attempts."""
        return self._earlier[0] + self._runtime[0] + self._since[0]

    @property
    def xla_s(self) -> float:
        """Seconds that XLA compiled, over all attempts."""
        return self._earlier[1] + self._runtime[1] + self._since[1]

    @property
    def total_s(self) -> float:
        """Seconds of tracing and of compiling, over all attempts."""
        return self.trace_s + self.xla_s

    def add(self, graph: GraphRecord) -> None:
        """Take the record of a graph that was compiled just now."""
        self.records += 1
        self.recompiles += graph.recompile
        self.trace_s += graph.trace_s
        self._since = (self._since[0] + 1, self._since[1] + graph.xla_s)
        if len(self.graphs) < GRAPHS_KEPT:
            self.graphs.append(dataclasses.asdict(graph))

    def runtime(self, count: int, seconds: float) -> None:
        """Take the runtime's counters of the current attempt."""
        self._runtime, self._since = (count, seconds), (0, 0.0)

    def restart(self) -> None:
        """A new process begins: its runtime counts from zero."""
        self._earlier = (self.count, self.xla_s)
        self._runtime = self._since = (0, 0.0)

    def figures(self) -> CompileFigures:
        """The figures of result.json."""
        return CompileFigures(
            count=self.count,
            total_s=self.total_s,
            trace_s=self.trace_s,
            xla_s=self.xla_s,
            recompiles=self.recompiles,
            graphs=list(self.graphs),
        )
