"""A recorded run, its configuration and TensorBoard's own reader."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runner.config.schema import (
    BackendConfig,
    Config,
    DataConfig,
    HardwareConfig,
    JobConfig,
    OptimConfig,
    ScheduleConfig,
)
from runner.record.events import (
    CheckpointSaved,
    Compiled,
    Ended,
    Evaluated,
    Event,
    GraphRecord,
    Phase,
    Planned,
    Started,
    StepRecord,
    Steps,
)
from runner.record.rundir import RunDir

STEPS = 6


def steps_event(
    *steps: int, compiled: bool = False, compiles: tuple[int, float] = (2, 3.0)
) -> Steps:
    """Steps that take 10 ms each plus their number, in one event."""
    records = [
        StepRecord(s, 5000.0 if compiled else 10.0 + s, 2.0, 1.0, 1, compiled) for s in steps
    ]
    last = steps[-1]
    return Steps(
        records=records,
        metrics={"loss": 2.0 / last, "lr": 0.1, "grad_norm": 0.5},
        compile_count=compiles[0],
        compile_s=compiles[1],
        device_bytes=1_000_000,
        host_rss_bytes=2_000_000,
        examples_per_step=32,
        tokens_per_step=320,
    )


def graph(role: str = "forward", *, step: int = 0, recompile: bool = False) -> Compiled:
    """A compiled graph: half a second of tracing, one and a half in XLA."""
    cause = "input 0: float32[32] -> float32[16] | x" if recompile else "first call"
    passes = {"norms": 3, "sums": 2}
    return Compiled(GraphRecord(role, 120, 0.5, 1.5, "abc", 4096, step, cause, recompile, passes))


def started(first_step: int = 0) -> Started:
    """A worker on one CPU device."""
    return Started(4242, "CPU", 1, {"torch": "2.9.0"}, first_step)


def recorded_run() -> list[Event]:
    """Six steps, the first of which compiles, and two evaluations."""
    return [
        started(),
        Phase("building"),
        Planned(STEPS, 1000, 8000, 512, 100, flops_per_step=1e9, peak_flops_per_s=1e12),
        Phase("training"),
        Phase("compiling", "forward"),
        graph("forward"),
        graph("backward"),
        steps_event(1, compiled=True),
        steps_event(2),
        steps_event(3),
        Phase("evaluating"),
        graph("eval", step=3),
        Evaluated(3, {"loss": 0.9, "accuracy": 0.5}, 100, 2.5),
        Phase("training"),
        CheckpointSaved(3, "checkpoints/step-00000003", 1, 0.25),
        steps_event(4, compiles=(3, 4.5)),
        steps_event(5, compiles=(3, 4.5)),
        steps_event(6, compiles=(3, 4.5)),
        Phase("evaluating"),
        Evaluated(6, {"loss": 0.7, "accuracy": 0.75}, 100, 0.5),
        Phase("training"),
        Ended(0, "", STEPS),
    ]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still until it is moved."""
    return Clock()


@pytest.fixture
def config() -> Config:
    """A run's configuration."""
    return Config(
        job=JobConfig("toy", "jobs.toy:Toy", batch_size=32),
        data=DataConfig("digits", "jobs.images:digits", options={"flip": True}),
        backend=BackendConfig("openxla"),
        optim=OptimConfig("SGD", 0.1, {"momentum": 0.9}),
        schedule=ScheduleConfig(),
        hardware=HardwareConfig(),
        steps=STEPS,
    )


@pytest.fixture
def run_dir(tmp_path: pathlib.Path) -> RunDir:
    """A run folder as the parent leaves it before the worker starts."""
    run = RunDir(tmp_path / "it's a run")
    run.create()
    run.environment.write_text('{"host": "here", "git": {"commit": "abc", "dirty": false}}')
    return run


@pytest.fixture
def read() -> Callable[[pathlib.Path], Any]:
    """Everything in a folder of event files, by TensorBoard's own reader."""

    def reader(folder: pathlib.Path) -> Any:
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        return accumulator.Reload()

    return reader
