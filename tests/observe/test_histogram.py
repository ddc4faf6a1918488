"""Step-time histograms, read back with TensorBoard's own reader."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tensorboard.plugins.histogram import metadata
from tensorboard.util import tensor_util

from runner.config.schema import Config
from runner.observe.histogram import EVERY, TAG
from runner.record.events import Event
from runner.record.rundir import RunDir
from tests.observe.conftest import started, steps_event
from tests.observe.test_observer import observe

Read = Callable[[pathlib.Path], Any]


def histograms(run_dir: RunDir, read: Read) -> dict[int, Any]:
    """Step to its buckets: left edge, right edge, count."""
    reader = read(run_dir.tensorboard)
    assert reader.SummaryMetadata(TAG).plugin_data.plugin_name == metadata.PLUGIN_NAME
    return {
        event.step: tensor_util.make_ndarray(event.tensor_proto) for event in reader.Tensors(TAG)
    }


def test_a_hundred_timed_steps_make_a_histogram_and_the_end_one_of_the_rest(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    one_by_one = (steps_event(step) for step in range(2, 152))
    observe(run_dir, config, [started(), steps_event(1, compiled=True), *one_by_one])
    found = histograms(run_dir, read)
    assert list(found) == [EVERY + 1, 151]
    # Step n takes 10 + n ms; the first compiled and is in none.
    for buckets, first, last in ((found[101], 2, 101), (found[151], 102, 151)):
        assert buckets.shape == (30, 3)
        assert (buckets[0, 0], buckets[-1, 1]) == (10 + first, 10 + last)
        assert buckets[:, 2].sum() == last - first + 1
        expected, _ = np.histogram(np.arange(first, last + 1) + 10.0, bins=30)
        assert buckets[:, 2].tolist() == expected.tolist()


def test_steps_that_a_retry_repeats_are_counted_once(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    first = [started(), *map(steps_event, range(1, 61))]
    again = [started(first_step=40), *map(steps_event, range(41, 81))]
    observe(run_dir, config, [*first, *again])
    (buckets,) = histograms(run_dir, read).values()
    assert buckets[:, 2].sum() == 80


@pytest.mark.parametrize("events", [[], [started(), steps_event(1, compiled=True)]])
def test_a_run_without_timed_steps_has_none(
    run_dir: RunDir, config: Config, read: Read, events: list[Event]
) -> None:
    observe(run_dir, config, events)
    assert TAG not in read(run_dir.tensorboard).Tags()["tensors"]


def test_equal_times_lie_in_one_bucket(run_dir: RunDir, config: Config, read: Read) -> None:
    observe(run_dir, config, [started(), steps_event(5)])
    (buckets,) = histograms(run_dir, read).values()
    (full,) = buckets[buckets[:, 2] > 0]
    assert full[0] <= 15.0 <= full[1]
    assert full[2] == 1
