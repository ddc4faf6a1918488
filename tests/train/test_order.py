"""The order of examples: a function of seed and step, every example once an epoch."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.record.errors import ConfigError
from runner.train.order import BatchOrder

SIZES = st.integers(1, 200).flatmap(
    lambda examples: st.tuples(st.just(examples), st.integers(1, examples))
)
SEEDS = st.integers(0, 2**63 - 1)


@given(SIZES, SEEDS, st.integers(0, 3))
def test_an_epoch_has_no_example_twice_and_drops_less_than_a_batch(
    sizes: tuple[int, int], seed: int, epoch: int
) -> None:
    examples, batch_size = sizes
    order = BatchOrder(examples, batch_size, seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = np.concatenate([order.indices(step) for step in steps])
    assert len(set(seen.tolist())) == len(seen)
    assert 0 <= examples - len(seen) < batch_size
    assert seen.min() >= 0
    assert seen.max() < examples


@given(SIZES, SEEDS, st.lists(st.integers(0, 1000), min_size=1, max_size=10))
@settings(deadline=None)
def test_a_batch_depends_on_seed_and_step_alone(
    sizes: tuple[int, int], seed: int, steps: list[int]
) -> None:
    examples, batch_size = sizes
    order = BatchOrder(examples, batch_size, seed)
    for step in steps:
        indices = order.indices(step)
        fresh = BatchOrder(examples, batch_size, seed).indices(step)
        assert indices.dtype == np.int64
        assert indices.shape == (batch_size,)
        assert (indices == fresh).all()


def test_epochs_and_seeds_differ_in_order() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return BatchOrder(100, 100, seed).indices(number).tolist()

    orders = {tuple(epoch(seed, number)) for seed in range(5) for number in range(5)}
    assert len(orders) == 25


def test_augmentation_is_a_function_of_seed_and_step() -> None:
    def draw(seed: int, step: int) -> int:
        return int(BatchOrder(10, 5, seed).rng(step).integers(2**62))

    draws = {(seed, step): draw(seed, step) for seed in range(5) for step in range(5)}
    assert len(set(draws.values())) == 25
    assert all(draw(*key) == value for key, value in draws.items())


def test_augmentation_does_not_draw_from_the_stream_of_the_permutation() -> None:
    order = BatchOrder(1000, 1000, 0)
    assert (order.rng(0).permutation(1000) != order.indices(0)).any()


def test_drawing_augmentation_does_not_change_the_order() -> None:
    order, untouched = BatchOrder(50, 10, 3), BatchOrder(50, 10, 3)
    for step in range(12):
        order.rng(step).random(100)
        assert (order.indices(step) == untouched.indices(step)).all()


@pytest.mark.parametrize("batch_size", [11, 0, -1])
def test_a_batch_that_cannot_be_filled_is_a_configuration_error(batch_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"job\.batch_size .* 10 examples.*got {batch_size}"):
        BatchOrder(10, batch_size, 0)


def test_ten_million_examples_cost_nothing_a_step_once_the_epoch_has_begun() -> None:
    order = BatchOrder(10_000_000, 1024, 0)
    order.indices(0)
    start = time.process_time()
    for step in range(1000):
        order.indices(step)
    assert time.process_time() - start < 0.2
