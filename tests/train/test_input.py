"""The input pipeline with real threads: order, limits, waits, errors, closing, padding."""

from __future__ import annotations

import itertools
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import jobs.base
from jobs.base import DataRequest
from jobs.images import digits, imagefolder
from runner.record.errors import DataError
from runner.train.input import InputPipeline, Prefetcher, evaluation_batches, read
from runner.train.order import BatchOrder

DEADLINE_S = 20.0


class Numbers:
    """Example i is the number i."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return self.examples

    def batch(
        self, indices: npt.NDArray[np.int64], *, rng: np.random.Generator | None
    ) -> jobs.base.Arrays:
        noise = np.zeros(len(indices)) if rng is None else rng.random(len(indices))
        return {"number": indices.copy(), "noise": noise}


def stay(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def pipeline(source: jobs.base.Source, **settings: object) -> InputPipeline:
    order = BatchOrder(len(source), 4, 0)
    values = {"first_step": 0, "last_step": 12, "place": stay, "depth": 2, **settings}
    return InputPipeline(source, order, **values)  # type: ignore[arg-type]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    yield
    wait_until(lambda: not prefetch_threads())


def test_batches_come_in_the_order_of_their_steps() -> None:
    source = Numbers(10)
    order = BatchOrder(10, 4, 0)
    with pipeline(source, first_step=3) as batches:
        got = list(batches)
    assert len(got) == 9
    for step, batch in enumerate(got, start=3):
        assert batch["number"].tolist() == order.indices(step).tolist()
        assert batch["noise"].tolist() == order.rng(step).random(4).tolist()


def test_a_run_that_starts_later_gets_the_same_batches() -> None:
    source = digits(DataRequest(None, {"image_size": 24, "channels": 1}, workers=1, seed=0)).train
    with pipeline(source, last_step=6) as batches:
        whole = list(batches)
    with pipeline(source, first_step=4, last_step=6) as batches:
        resumed = list(batches)
    assert [
        torch.equal(a["image"], b["image"]) for a, b in zip(whole[4:], resumed, strict=False)
    ] == [True] * 2


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_depth_batches_are_prepared_ahead(depth: int) -> None:
    placed = []

    def place(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        placed.append(batch)
        return batch

    with pipeline(Numbers(10), place=place, depth=depth) as batches:
        wait_until(lambda: len(placed) == depth)
        next(batches)
        wait_until(lambda: len(placed) == depth + 1)
    assert len(placed) == depth + 1


def test_batches_are_placed_in_the_background() -> None:
    places: list[str] = []

    def place(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        places.append(threading.current_thread().name)
        return {name: tensor.float() for name, tensor in batch.items()}

    with pipeline(Numbers(10), place=place) as batches:
        assert all(batch["number"].dtype == torch.float32 for batch in batches)
    assert set(places) == {"prefetch"}


def test_the_wait_for_a_batch_is_measured() -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        gate.wait(DEADLINE_S)
        yield 1

    ticks = itertools.count(step=10.0)
    asked = threading.Event()

    def clock() -> float:
        asked.set()
        return next(ticks)

    prefetcher = Prefetcher(items(), depth=1, clock=clock)
    opener = threading.Thread(target=lambda: (asked.wait(DEADLINE_S), gate.set()))
    opener.start()
    assert next(prefetcher) == 1
    assert prefetcher.waited_s == 10.0
    opener.join()
    prefetcher.close()


def test_an_exception_keeps_its_type_and_comes_after_the_batches_before_it() -> None:
    class Odd(Exception):
        pass

    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise Odd("three")

    prefetcher = Prefetcher(items(), depth=5, clock=time.monotonic)
    assert [next(prefetcher), next(prefetcher)] == [1, 2]
    for _ in range(2):
        with pytest.raises(Odd, match="three"):
            next(prefetcher)
    prefetcher.close()


def test_a_broken_image_ends_the_run_with_the_runners_data_error(tmp_path: pathlib.Path) -> None:
    for number in range(8):
        path = tmp_path / "train" / "one" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(path)
    (tmp_path / "train" / "one" / "5.png").write_text("no image")
    source = imagefolder(DataRequest(str(tmp_path), {"image_size": 8}, workers=2, seed=0)).train
    with pytest.raises(DataError, match=r"one/5\.png"), pipeline(source) as batches:
        list(batches)
    with pytest.raises(DataError, match=r"one/5\.png"):
        list(evaluation_batches(source, 3))


def test_an_exception_in_the_consumer_ends_the_thread() -> None:
    def consume() -> None:
        with pipeline(Numbers(10)) as batches:
            next(batches)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert not prefetch_threads()


def test_a_consumer_that_stops_early_ends_the_thread_at_once() -> None:
    start = time.monotonic()
    with pipeline(Numbers(10), last_step=10**9) as batches:
        next(batches)
    assert not prefetch_threads()
    assert time.monotonic() - start < 1


def test_closing_twice_or_unused_is_harmless() -> None:
    prefetcher = Prefetcher(iter(range(3)), depth=1, clock=time.monotonic)
    prefetcher.close()
    prefetcher.close()
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_closing_does_not_wait_for_a_blocked_source() -> None:
    gate, entered = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        entered.set()
        gate.wait(DEADLINE_S)
        yield 1

    prefetcher = Prefetcher(items(), depth=1, clock=time.monotonic)
    assert entered.wait(DEADLINE_S)
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 5
    assert all(thread.daemon for thread in prefetch_threads())
    gate.set()


def test_closing_wakes_a_consumer_that_waits() -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        gate.wait(DEADLINE_S)
        yield 1

    prefetcher = Prefetcher(items(), depth=1, clock=time.monotonic)
    got: list[list[int]] = []
    consumer = threading.Thread(target=lambda: got.append(list(prefetcher)))
    consumer.start()
    prefetcher.close()
    consumer.join(DEADLINE_S)
    assert got == [[]]
    gate.set()


def test_tensors_share_memory_with_the_arrays_of_the_source() -> None:
    arrays = {"x": np.arange(6.0)}

    class Fixed(Numbers):
        def batch(
            self, indices: npt.NDArray[np.int64], *, rng: np.random.Generator | None
        ) -> jobs.base.Arrays:
            return arrays

    tensors = read(Fixed(6), np.arange(6), rng=None)
    assert tensors["x"].data_ptr() == arrays["x"].ctypes.data


@pytest.mark.parametrize("kind", ["read-only", "backwards"])
def test_arrays_that_torch_cannot_hold_are_copied(kind: str) -> None:
    array = np.arange(6.0)
    array.flags.writeable = kind != "read-only"
    given_array = array[::-1] if kind == "backwards" else array

    class Fixed(Numbers):
        def batch(
            self, indices: npt.NDArray[np.int64], *, rng: np.random.Generator | None
        ) -> jobs.base.Arrays:
            return {"x": given_array}

    assert read(Fixed(6), np.arange(6), rng=None)["x"].tolist() == given_array.tolist()


@given(st.integers(0, 60), st.integers(1, 25))
def test_evaluation_counts_every_example_exactly_once(examples: int, batch_size: int) -> None:
    counted: list[int] = []
    for batch, mask in evaluation_batches(Numbers(examples), batch_size):
        assert mask.shape == batch["number"].shape == (batch_size,)
        assert mask.dtype == torch.float32
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert batch["number"].min() >= 0
        assert batch["number"].max() < examples
        counted += batch["number"][mask.bool()].tolist()
    assert counted == list(range(examples))


def test_evaluation_is_not_random() -> None:
    for batch, _ in evaluation_batches(Numbers(5), 2):
        assert batch["noise"].tolist() == [0.0, 0.0]
