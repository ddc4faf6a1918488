"""The learning rate is a function of the step, never zero, and ends where it should."""

from __future__ import annotations

import pytest

from runner.config.schema import ScheduleConfig
from runner.train.schedule import learning_rate


def rates(name: str, *, warmup: float, final: float, steps: int = 100) -> list[float]:
    config = ScheduleConfig(name, warmup_fraction=warmup, final_fraction=final)
    return [learning_rate(config, lr=2.0, step=step, steps=steps) for step in range(steps)]


def test_warm_up_rises_linearly_to_the_peak() -> None:
    first = rates("constant", warmup=0.1, final=1.0)
    assert first[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert set(first[10:]) == {2.0}


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_a_decay_falls_all_the_way_and_stays_above_its_end(name: str, final: float) -> None:
    falling = rates(name, warmup=0.1, final=final)[10:]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == 2.0
    assert 2.0 * final < falling[-1] < 2.0 * (final + 0.02)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_no_update_has_a_rate_of_zero(name: str, steps: int) -> None:
    final = 1.0 if name == "constant" else 0.0
    assert min(rates(name, warmup=0.5, final=final, steps=steps)) > 0
