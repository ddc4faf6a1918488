"""The learning rate as a function of the step, and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

from runner.config.schema import ScheduleConfig

#: Factor on the peak rate, from the part of the way down that is done, in [0, 1).
_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate(config: ScheduleConfig, *, lr: float, step: int, steps: int) -> float:
    """The learning rate of the update after `step` completed ones.

    It is never exactly 0: the first update of a warm-up is a share of the peak, and the
    last one of a decay is still above the end.

    Args:
        config: Shape, warm-up and end of the schedule.
        lr: Peak learning rate.
        step: Completed updates, in [0, steps).
        steps: Updates of the whole run.
    """
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    shape = _SHAPES[config.name](progress)
    floor = config.final_fraction if config.name != "constant" else 0.0
    return lr * (floor + (1.0 - floor) * shape)
