"""When the state is saved, what is kept, and what a save that fails costs."""

from __future__ import annotations

import pathlib
import threading

import pytest
import torch

from runner.backends.snapshot import Snapshot, snapshot_of
from runner.backends.state import TrainState
from runner.config.schema import CheckpointConfig
from runner.record.errors import CheckpointError, NonFiniteError
from runner.record.events import CheckpointSaved, Event, Notice
from runner.record.storage import LocalStorage
from runner.train.checkpoint import Label
from runner.train.saver import Saver

LABEL = Label({}, {})


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def take(step: int, value: float = 1.0) -> Snapshot:
    return snapshot_of(TrainState({"w": torch.full((4,), value)}, {}, {}, step=step))


class Bench:
    """A saver on a folder, with its clock and its events."""

    def __init__(self, folder: pathlib.Path, **settings: object) -> None:
        self.clock, self.events = Clock(), list[Event]()
        self.storage = LocalStorage(folder)
        config = CheckpointConfig(**settings)  # type: ignore[arg-type]
        self.saver = Saver(
            self.storage, config, label=LABEL, send=self.events.append, clock=self.clock
        )

    def run(self, steps: int, *, seconds_a_step: float = 1.0) -> list[int]:
        """Steps at which a training loop would have saved."""
        saved = []
        for step in range(steps):
            if self.saver.due(step):
                self.saver.save(step, take)
                self.saver._join()
                saved.append(step)
            self.clock.now += seconds_a_step
        return saved


def test_it_saves_every_so_many_steps(tmp_path: pathlib.Path) -> None:
    assert Bench(tmp_path, every_steps=3, every_s=None).run(10) == [3, 6, 9]


def test_it_saves_every_so_many_seconds(tmp_path: pathlib.Path) -> None:
    assert Bench(tmp_path, every_s=25.0).run(100, seconds_a_step=10.0)[:4] == [3, 6, 9, 12]


def test_steps_and_seconds_go_together(tmp_path: pathlib.Path) -> None:
    bench = Bench(tmp_path, every_steps=10, every_s=4.0)
    assert bench.run(24) == [4, 8, 10, 14, 18, 20]


def test_several_steps_a_call_save_at_the_next_call(tmp_path: pathlib.Path) -> None:
    bench = Bench(tmp_path, every_steps=4, every_s=None)
    due = []
    for step in range(0, 20, 3):
        if bench.saver.due(step):
            bench.saver.save(step, take)
            due.append(step)
    assert due == [6, 9, 12, 18]


def test_switched_off_it_never_saves(tmp_path: pathlib.Path) -> None:
    bench = Bench(tmp_path, enabled=False, every_steps=1)
    assert bench.run(5) == []
    bench.saver.finish(5, take)
    assert bench.storage.names() == []


def test_the_newest_are_kept_and_every_so_many_for_ever(tmp_path: pathlib.Path) -> None:
    bench = Bench(tmp_path, every_steps=2, every_s=None, keep=2, keep_every_steps=6)
    bench.run(20)
    assert bench.storage.steps() == [18, 16, 12, 6]
    assert len(bench.storage.names()) == 4


def test_the_last_state_is_saved_once(tmp_path: pathlib.Path) -> None:
    bench = Bench(tmp_path, every_s=None)
    for _ in range(2):
        bench.saver.finish(7, take)
    assert [e.step for e in bench.events if isinstance(e, CheckpointSaved)] == [7]


def test_a_state_that_is_lost_is_not_saved(tmp_path: pathlib.Path) -> None:
    bench = Bench(tmp_path, every_steps=1, every_s=None)
    bench.run(3)
    bench.saver.save(3, lambda step: take(step, float("inf")))
    with pytest.raises(NonFiniteError, match="w was not after step 3"):
        bench.saver.finish(4, take)
    assert bench.storage.steps() == [2, 1]


def test_failures_are_counted_in_a_row(tmp_path: pathlib.Path) -> None:
    bench = Bench(tmp_path / "room", every_steps=1, every_s=None, failures=2)
    (tmp_path / "room").touch()  # no folder can be made here
    bench.run(2)
    (tmp_path / "room").unlink()
    bench.saver.save(2, take)
    bench.saver._join()
    assert bench.storage.steps() == [2]
    warnings = [event.message for event in bench.events if isinstance(event, Notice)]
    assert len(warnings) == 1
    assert "failure 1 of 2" in warnings[0]


def test_too_many_failures_end_the_run(tmp_path: pathlib.Path) -> None:
    bench = Bench(tmp_path / "room", every_steps=1, every_s=None, failures=2)
    (tmp_path / "room").touch()
    with pytest.raises(CheckpointError, match="failure 2 in a row of the 2"):
        bench.run(5)


def test_one_save_is_under_way_at_a_time(tmp_path: pathlib.Path) -> None:
    bench = Bench(tmp_path, every_s=5.0)
    wait, began = threading.Event(), threading.Event()
    begin = bench.storage.begin

    def slow(name: str) -> str:
        began.set()
        assert wait.wait(60)
        return begin(name)

    bench.storage.begin = slow  # type: ignore[method-assign]
    bench.saver.save(1, take)
    assert began.wait(60)
    bench.clock.now += 100
    assert not bench.saver.due(2), "by the clock it is due once the one before is written"
    wait.set()
    bench.saver._join()
    assert bench.saver.due(2)
