"""Prose as bytes: what is in it, how it is split and cut into windows, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jobs.base import DataError, DataRequest, SettingError
from jobs.text import BYTES, Corpus, WindowSource, examples, prose


def request(seq_len: object = 64, seed: int = 0) -> DataRequest:
    return DataRequest(
        root=None, options={"seq_len": seq_len, "mask_fraction": 0.0}, workers=1, seed=seed
    )


def source(count: int = 100, seq_len: int = 8) -> WindowSource:
    return WindowSource(np.arange(count, dtype=np.uint16), seq_len)


def text_of(part: object) -> str:
    assert isinstance(part, WindowSource)
    return part.tokens.tobytes().decode(errors="replace")


def test_it_is_english_and_a_tenth_is_held_out() -> None:
    data = prose(request())
    train, heldout = text_of(data.train), text_of(data.heldout)
    assert train.count(" the ") > 1000
    assert len(train) + len(heldout) > 200_000
    assert len(heldout) / (len(train) + len(heldout)) == pytest.approx(0.1, abs=0.001)


def test_no_heldout_paragraph_was_trained_on() -> None:
    data = prose(request())
    train, heldout = (set(text_of(part).split("\n\n")) for part in (data.train, data.heldout))
    assert len(heldout) > 100
    assert train.isdisjoint(heldout)


def test_the_facts_say_what_a_model_must_know() -> None:
    data = prose(request(32))
    heldout = len(text_of(data.heldout).encode(errors="replace"))
    assert data.facts["vocabulary"] == BYTES
    assert data.facts["seq_len"] == 32
    assert data.facts["heldout_bytes"] == data.facts["heldout_tokens"]
    assert data.facts["heldout_tokens"] == pytest.approx(heldout, abs=10)


def test_the_seed_changes_neither_text_nor_split() -> None:
    first, second = (prose(request(seed=seed)) for seed in (0, 1))
    assert text_of(first.train) == text_of(second.train)


def test_windows_follow_each_other_and_the_target_is_the_next_token() -> None:
    batch = source().batch(np.arange(3), rng=None)
    assert batch["tokens"].tolist() == np.arange(24).reshape(3, 8).tolist()
    assert batch["target"].tolist() == np.arange(1, 25).reshape(3, 8).tolist()
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize(("count", "examples"), [(9, 1), (16, 1), (17, 2), (100, 12)])
def test_every_window_has_a_next_token(count: int, examples: int) -> None:
    stream = source(count)
    assert len(stream) == examples
    assert stream.batch(np.array([examples - 1]), rng=None)["target"].max() < count


def test_training_shifts_windows_and_stays_inside_the_text() -> None:
    stream = source(count=41)
    indices = np.repeat(np.arange(len(stream)), 200)
    batch = stream.batch(indices, rng=np.random.default_rng(0))
    assert set(batch["tokens"][indices == 0, 0]) == set(range(8))
    assert batch["target"].max() == 40
    assert (batch["target"] == batch["tokens"] + 1).all()


def test_the_same_generator_gives_the_same_windows() -> None:
    first, again, other = (
        source().batch(np.arange(12), rng=np.random.default_rng(seed))["tokens"]
        for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("value", [0, -1, 1.5, "128", True])
def test_a_length_that_is_no_whole_number_is_named(value: object) -> None:
    with pytest.raises(SettingError, match=r"data\.options\.seq_len must be .* >= 1; got"):
        prose(request(value))


def test_a_length_beyond_the_text_is_named_with_the_limit() -> None:
    with pytest.raises(SettingError, match=r"data\.options\.seq_len must be < \d+, .*got 1000000"):
        prose(request(1_000_000))
    with pytest.raises(SettingError, match=r"must be < 8, .*got 8"):
        examples(Corpus(np.zeros(8, dtype=np.uint8), None, 2, 0), request(8))


def test_a_python_without_the_text_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc_data\.topics"):
        prose(request())
