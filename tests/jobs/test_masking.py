"""Masked examples: how many, which, what takes their place, and when they repeat."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.base import SettingError
from jobs.masking import MaskedSource, masked_tokens
from jobs.text import WindowSource

MASK = 300
LENGTH = 40


def source(count: int = 6) -> MaskedSource:
    stream = np.random.default_rng(5).integers(256, size=4001).astype(np.uint8)
    return MaskedSource(WindowSource(stream, LENGTH), count, MASK, 256)


def test_every_example_has_the_same_number_of_chosen_tokens() -> None:
    batch = source().batch(np.arange(100), rng=np.random.default_rng(0))
    assert len(source()) == 100
    assert {name: a.dtype for name, a in batch.items()} == {
        "tokens": np.int64,
        "chosen": np.bool_,
        "target": np.int64,
    }
    assert (batch["chosen"].sum(axis=1) == 6).all()


def test_tokens_that_are_not_chosen_stay() -> None:
    batch = source().batch(np.arange(100), rng=np.random.default_rng(0))
    kept = ~batch["chosen"]
    assert (batch["tokens"] == batch["target"])[kept].all()
    assert batch["target"].max() < 256


def test_chosen_tokens_are_hidden_replaced_or_kept_as_in_bert() -> None:
    rng = np.random.default_rng(0)
    batches = [source().batch(np.arange(100), rng=rng) for _ in range(20)]
    tokens, chosen, target = (
        np.concatenate([batch[name] for batch in batches])
        for name in ("tokens", "chosen", "target")
    )
    tokens, target = tokens[chosen], target[chosen]
    assert (tokens == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (tokens == target).mean() == pytest.approx(0.1, abs=0.02)
    other = tokens[(tokens != MASK) & (tokens != target)]
    assert other.max() < 256
    assert len(set(other)) > 200


def test_every_position_is_chosen_alike() -> None:
    rng = np.random.default_rng(0)
    counts = sum(source().batch(np.arange(100), rng=rng)["chosen"].sum(axis=0) for _ in range(20))
    assert np.abs(counts / 2000 - 6 / LENGTH).max() < 0.04


def test_an_evaluation_masks_an_example_always_alike() -> None:
    first = source().batch(np.array([3, 4, 5]), rng=None)
    again = source().batch(np.array([5, 9, 3]), rng=None)
    for name in first:
        assert (first[name][[0, 2]] == again[name][[2, 0]]).all()
    assert (first["chosen"][0] != first["chosen"][1]).any()


def test_the_same_generator_masks_alike() -> None:
    first, again, other = (
        source().batch(np.arange(10), rng=np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["chosen"] != other["chosen"]).any()


@pytest.mark.parametrize(("part", "count"), [(0, 0), (0.15, 6), (0.5, 20)])
def test_the_fraction_is_of_the_tokens(part: float, count: int) -> None:
    assert masked_tokens({"mask_fraction": part}, LENGTH) == count


@pytest.mark.parametrize("part", [-0.1, 1, "much", 0.001])
def test_a_fraction_that_breaks_a_rule_is_named(part: object) -> None:
    with pytest.raises(SettingError, match=r"data\.options\.mask_fraction must .*got"):
        masked_tokens({"mask_fraction": part}, LENGTH)
