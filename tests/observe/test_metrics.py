"""Figures: what a run has come to, over all its attempts."""

from __future__ import annotations

import pytest

from runner.observe.metrics import Tally
from runner.record.events import (
    Ended,
    Evaluated,
    Event,
    GraphRecord,
    Phase,
    Planned,
    StepRecord,
    Steps,
)
from runner.record.outcome import Result
from tests.observe.conftest import Clock, graph, recorded_run, started, steps_event


def take_all(tally: Tally, events: list[Event]) -> None:
    for event in events:
        tally.take(event)


def test_a_step_that_compiled_is_in_no_step_time_figure() -> None:
    tally = Tally()
    take_all(tally, recorded_run())
    result = tally.fill(Result("toy", "openxla"))
    assert result.steps == 6
    assert result.step.median_ms == pytest.approx(14.0)
    assert result.step.p95_ms == pytest.approx(15.8)
    assert result.step.host_median_ms == 2.0
    assert result.step.data_wait_median_ms == 1.0
    assert result.step.programs_per_step == 1.0
    assert result.throughput.examples_per_s == pytest.approx(5 * 32 / 0.070)
    assert result.throughput.tokens_per_s == pytest.approx(5 * 320 / 0.070)


def test_compiles_are_those_that_the_runtime_counted_and_the_records_since() -> None:
    tally = Tally()
    take_all(tally, [started(), graph(), steps_event(1, compiled=True, compiles=(4, 9.0))])
    assert (tally.compiles.count, tally.compiles.xla_s) == (4, 9.0)
    tally.take(graph("eval"))
    figures = tally.fill(Result("toy", "openxla")).compile
    assert (figures.count, figures.xla_s, figures.trace_s) == (5, 10.5, 1.0)
    assert figures.total_s == 11.5
    assert [record["role"] for record in figures.graphs] == ["forward", "eval"]


def test_goodput_counts_no_second_twice() -> None:
    tally = Tally()
    take_all(tally, recorded_run())
    goodput = tally.fill(Result("toy", "openxla")).goodput
    assert goodput.productive_s == pytest.approx(0.065)
    assert goodput.data_s == pytest.approx(0.005)
    assert goodput.compile_s == pytest.approx(6.0)
    assert goodput.eval_s == pytest.approx(0.5 + 0.5)  # 2 s of the first were a compile
    assert goodput.checkpoint_s == 0.25
    assert goodput.lost_s == 0.0


def test_mfu_is_the_share_of_all_devices_peak_and_unknown_without_a_peak() -> None:
    tally, blind = Tally(), Tally()
    take_all(tally, recorded_run())
    unknown = Planned(6, 1000, 8000, 512, 100, flops_per_step=1e9, peak_flops_per_s=None)
    take_all(blind, [unknown if isinstance(e, Planned) else e for e in recorded_run()])
    assert tally.fill(Result("toy", "openxla")).mfu == pytest.approx(1e9 / (0.014 * 1e12))
    assert blind.fill(Result("toy", "openxla")).mfu is None


def test_final_metrics_are_the_last_step_and_the_last_evaluation() -> None:
    tally = Tally()
    take_all(tally, recorded_run())
    assert tally.fill(Result("toy", "openxla")).final == {
        "train/loss": pytest.approx(2 / 6),
        "train/lr": 0.1,
        "train/grad_norm": 0.5,
        "eval/loss": 0.7,
        "eval/accuracy": 0.75,
    }


def test_steps_that_a_retry_repeats_are_counted_once_and_their_time_is_lost(clock: Clock) -> None:
    tally = Tally(clock=clock)
    take_all(tally, [started(), graph(), steps_event(1, compiled=True, compiles=(1, 1.5))])
    take_all(tally, [steps_event(2, 3), steps_event(4, 5)])
    clock.seconds += 20.0
    take_all(tally, [started(first_step=2), graph(), Phase("training")])
    take_all(tally, [steps_event(3, compiled=True, compiles=(1, 1.5)), steps_event(4, 5, 6)])
    tally.take(Ended(0, "", 6))
    result = tally.fill(Result("toy", "openxla"))
    assert result.steps == 6
    # Steps 2, 4, 5, 6: 12, 14, 15 and 16 ms; 3, 4, 5 of the first attempt were repeated.
    assert result.step.median_ms == pytest.approx(14.5)
    assert result.goodput.productive_s == pytest.approx(0.057 - 0.004)
    assert result.goodput.lost_s == pytest.approx(20.0 + 0.042, rel=1e-6)
    assert result.compile.count == 4  # two in each process
    assert len(result.compile.graphs) == 2


def test_a_retry_that_dies_before_its_first_step_shows_no_metrics_of_undone_steps() -> None:
    tally = Tally()
    take_all(tally, [started(), steps_event(1, 2, 3), Evaluated(3, {"loss": 1.0}, 10, 0.1)])
    tally.take(started(first_step=1))
    result = tally.fill(Result("toy", "openxla"))
    assert (result.steps, result.final) == (1, {})


def test_an_event_of_several_steps_gives_the_mean_of_those_that_did_not_compile() -> None:
    tally = Tally()
    records = [
        StepRecord(1, 9000.0, 5.0, 5.0, 9, True),
        StepRecord(2, 10.0, 1.0, 0.0, 1, False),
        StepRecord(3, 30.0, 3.0, 2.0, 2, False),
    ]
    point = tally.take(Steps(records, {"loss": 1.0}, 1, 2.0, 3, 4, 30))
    assert point is not None
    assert point.step == 3
    values = point.values
    assert (values["step/time_ms"], values["step/host_ms"]) == (20.0, 2.0)
    assert (values["step/data_wait_ms"], values["step/programs"]) == (1.0, 1.5)
    assert values["throughput/examples_per_s"] == 1500.0
    assert values["compile/first_step_s"] == 9.0
    assert "throughput/tokens_per_s" not in values
    assert "util/mfu" not in values


def test_productive_fraction_is_of_the_wall_clock(clock: Clock) -> None:
    tally = Tally(clock=clock)
    tally.take(started())
    clock.seconds += 1.0
    point = tally.take(steps_event(*range(90, 100)))
    assert point is not None
    productive_s = sum(9.0 + step for step in range(90, 100)) / 1e3
    assert point.values["goodput/productive_fraction"] == pytest.approx(min(1.0, productive_s))


def test_a_recompile_storm_is_counted_but_not_kept_whole() -> None:
    tally = Tally()
    record = GraphRecord("step", 1, 0.0, 0.0, "", 0, 1, "x", recompile=True)
    for _ in range(1500):
        tally.compiles.add(record)
    figures = tally.fill(Result("toy", "openxla")).compile
    assert (figures.recompiles, figures.count, len(figures.graphs)) == (1500, 1500, 1000)
