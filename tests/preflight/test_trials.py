"""The search for the largest batch, on memory that grows in every way that it may."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config.schema import Config, HardwareConfig, ParallelConfig
from runner.preflight.trials import changes, largest_batch, suggestions, with_batch
from runner.record.errors import BackendError
from runner.record.preflight import PreflightReport
from tests.preflight.reports import config, report

CAPACITY = 1_000_000


def judge(memory: Callable[[int], int]) -> Callable[[Config], PreflightReport]:
    def judged(asked: Config) -> PreflightReport:
        size = asked.job.batch_size
        total = memory(size)
        whole = report(fits=total <= CAPACITY, total=total, capacity=CAPACITY)
        return dataclasses.replace(whole, batch_size=size)

    return judged


def found(memory: Callable[[int], int], *, start: int, multiple: int) -> tuple[int, int]:
    asked = with_batch(config(), start)
    best, trials = largest_batch(asked, judge(memory)(asked), judge(memory), multiple=multiple)
    return best.batch_size, len(trials)


@settings(max_examples=300, deadline=None)
@given(
    fixed=st.integers(0, 900_000),
    slope=st.integers(1, 5_000),
    multiple=st.sampled_from([1, 2, 8, 64]),
    start=st.integers(1, 40),
)
def test_on_a_straight_line_the_answer_is_exact(
    fixed: int, slope: int, multiple: int, start: int
) -> None:
    size, compiles = found(
        lambda batch: fixed + slope * batch, start=start * multiple, multiple=multiple
    )
    largest = (CAPACITY - fixed) // slope // multiple * multiple
    assert size == max(largest, multiple)
    assert compiles <= 8


@settings(max_examples=200, deadline=None)
@given(slope=st.integers(10, 2_000), step=st.integers(1_000, 50_000), start=st.integers(1, 64))
def test_memory_that_grows_in_stairs_is_searched_within_the_limit(
    slope: int, step: int, start: int
) -> None:
    def memory(batch: int) -> int:
        return slope * batch // step * step

    size, compiles = found(memory, start=start, multiple=1)
    assert memory(size) <= CAPACITY
    assert compiles <= 16


def test_if_nothing_fits_the_smallest_is_reported() -> None:
    size, _ = found(lambda batch: 2 * CAPACITY + batch, start=64, multiple=8)
    assert size == 8


def test_what_may_help_is_listed_without_a_judge_and_judged_with_one() -> None:
    asked = with_batch(config(), 64)
    assert [change.override for change in changes(asked)] == [
        "precision=bf16",
        "remat=layers",
        "accumulate_steps=2",
        "remat=layers accumulate_steps=2",
        "job.batch_size=32",
    ]
    together = list(changes(asked))[3].config
    assert (together.remat, together.accumulate_steps) == ("layers", 2)
    assert [trial.fits for trial in suggestions(asked, None)] == [None] * 5
    judged = suggestions(asked, judge(lambda batch: batch * 20_000))
    assert [trial.fits for trial in judged] == [False, False, False, False, True]
    assert judged[4].total == 640_000


def test_on_a_slice_the_state_may_be_cut_where_the_batch_divides() -> None:
    def offered(parallel: str, batch: int) -> list[str]:
        plain = config()
        asked = dataclasses.replace(
            plain,
            job=dataclasses.replace(plain.job, batch_size=batch, eval_batch_size=64),
            hardware=HardwareConfig(name="v5e-8"),
            parallel=ParallelConfig(parallel),
        )
        return [change.override for change in changes(asked)]

    assert "parallel=fsdp" in offered("single", 64)
    assert "parallel=fsdp" in offered("data", 64)
    assert "remat=layers parallel=fsdp accumulate_steps=2" in offered("data", 64)
    assert "parallel=fsdp" not in offered("fsdp", 64)
    assert "parallel=fsdp" not in offered("single", 12)
    assert "accumulate_steps=2" not in offered("data", 8)
    assert "remat=layers parallel=fsdp" in offered("data", 8)
    assert "job.batch_size=8" in offered("data", 16)
    assert not [one for one in offered("data", 8) if one.startswith("job.batch_size")]


def test_a_suggestion_that_does_not_compile_says_why() -> None:
    def refuses(asked: Config) -> PreflightReport:
        raise BackendError("no such operation")

    assert {trial.why for trial in suggestions(config(), refuses)} == {"no such operation"}


@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (6, 6)])
def test_a_batch_that_cannot_be_halved_is_left_alone(batch: int, parts: int) -> None:
    asked = dataclasses.replace(with_batch(config(), batch), accumulate_steps=parts)
    assert [change.override for change in changes(asked)] == [
        "precision=bf16",
        "remat=layers",
    ]
