"""Histograms of step times: a slow step in a hundred shows here and not in a mean."""

from __future__ import annotations

import array
import bisect
import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from runner.record.events import StepRecord

#: The tag in TensorBoard. A tag has one kind of content, and `step/time_ms` has scalars.
TAG = "step/time_ms_histogram"
#: Timed steps of one histogram.
EVERY = 100
_BUCKETS = 30

#: Shape (buckets, 3): left edge, right edge, count.
Buckets: TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How long some steps took.

    Attributes:
        step: The last of these steps.
        buckets: Edges in milliseconds, and how many steps lie between them.
    """

    step: int
    buckets: Buckets


class StepTimeHistogram:
    """Gathers the times of steps that neither compiled nor were profiled, 100 at a time."""

    def __init__(self) -> None:
        self._steps = array.array("q")
        self._time_ms = array.array("d")

    def add(self, records: Sequence[StepRecord]) -> Histogram | None:
        """Take completed steps, oldest first; returns a histogram if enough have gathered."""
        for record in records:
            if record.timed:
                self._steps.append(record.step)
                self._time_ms.append(record.time_ms)
        return self.rest() if len(self._steps) >= EVERY else None

    def drop_after(self, step: int) -> None:
        """Forget the steps after `step`, which will be repeated."""
        kept = bisect.bisect_right(self._steps, step)
        del self._steps[kept:], self._time_ms[kept:]

    def rest(self) -> Histogram | None:
        """The histogram of what has gathered so far, or None if that is nothing."""
        if not self._steps:
            return None
        counts, edges = np.histogram(self._time_ms, bins=_BUCKETS)
        histogram = Histogram(self._steps[-1], np.stack([edges[:-1], edges[1:], counts], axis=1))
        del self._steps[:], self._time_ms[:]
        return histogram
