"""Rules on values, one function a section. Types are checked before, by `runner.config.typed`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from runner.config import names
from runner.config.mistakes import Mistake, did_you_mean, listed
from runner.config.schema import Config, Mode
from runner.config.typed import check_like


def check_rules(config: Config) -> None:
    """Every rule, in the order of the sections.

    Raises:
        Mistake: The first rule that is broken.
    """
    for rule in (_run, _batch, _backend, _optimizer, _schedule, _hardware):
        rule(config)


def _run(config: Config) -> None:
    _at_least("steps", config.steps, 1)
    _at_least("log_every", config.log_every, 1)
    _at_least("eval_every", config.eval_every, 0)
    _at_least("seed", config.seed, 0)
    if config.seed >= 2**63:
        raise Mistake("seed", f"seed must be below 2**63: it is 64 bits wide; got {config.seed}")
    if config.grad_clip_norm is not None:
        _positive("grad_clip_norm", config.grad_clip_norm)


def _batch(config: Config) -> None:
    size, parts = config.job.batch_size, config.accumulate_steps
    _at_least("job.batch_size", size, 1)
    _at_least("job.eval_batch_size", config.job.eval_batch_size, 1)
    _at_least("data.workers", config.data.workers, 1)
    _at_least("data.prefetch", config.data.prefetch, 1)
    _at_least("accumulate_steps", parts, 1)
    if size % parts:
        raise Mistake(
            "accumulate_steps",
            "accumulate_steps must divide job.batch_size: micro-batches have one size; got "
            f"{parts} and {size}; the nearest batch sizes are {nearest_multiples(size, parts)}",
        )


def _backend(config: Config) -> None:
    name = config.backend.name
    _one_of("backend.name", name, names.BACKENDS)
    if config.mode is Mode.train and name not in names.TRAINING_BACKENDS:
        raise Mistake(
            "backend.name",
            f"backend.name must be one of {listed(names.TRAINING_BACKENDS)} to train: {name} has "
            f"no backward pass; got {name!r} with mode=train. Use mode=evaluate, or another "
            "backend",
        )
    if name == "eager" and config.hardware.name == "tpu":
        raise Mistake(
            "hardware.name",
            "hardware.name must be auto or cpu with backend=eager: eager runs on the host; "
            "got 'tpu'",
        )
    _steps_per_call(config)


def _steps_per_call(config: Config) -> None:
    key, count = "backend.steps_per_call", config.backend.steps_per_call
    _at_least(key, count, 1)
    if count == 1:
        return
    if config.backend.name != "openxla_step":
        raise Mistake(
            key,
            f"{key} must be 1 with backend={config.backend.name}: only openxla_step makes "
            f"several updates in one program; got {count}",
        )
    for name, value in (("steps", config.steps), ("eval_every", config.eval_every)):
        if value % count:
            raise Mistake(
                key,
                f"{key} must divide {name}: between the updates of one call there is no place to "
                f"stop or to evaluate; got {count} and {value}; the nearest {name} are "
                f"{nearest_multiples(value, count)}",
            )


def nearest_multiples(value: int, factor: int) -> str:
    """The multiples of `factor` around `value`, for a message; 0 is none."""
    below = value - value % factor
    return " and ".join(str(near) for near in (below, below + factor) if near)


def _optimizer(config: Config) -> None:
    name = config.optim.name
    if name in names.REFUSED_OPTIMIZERS:
        raise Mistake(
            "optim.name", f"optim.name must not be {name}: {names.REFUSED_OPTIMIZERS[name]}"
        )
    _one_of("optim.name", name, names.OPTIMIZERS)
    _positive("optim.lr", config.optim.lr)
    for option, value in config.optim.options.items():
        _optimizer_option(name, option, value)


def _optimizer_option(optimizer: str, option: str, value: Any) -> None:
    key = f"optim.options.{option}"
    if option in names.RUNNER_OPTIONS:
        reason = names.RUNNER_OPTIONS[option]
        raise Mistake(key, f"{key} must go: {reason}; got {value!r}")
    known = names.OPTIMIZERS[optimizer]
    if option not in known:
        meant = did_you_mean(option, known)
        raise Mistake(
            key,
            f"{key} is not an option of torch.optim.{optimizer}{meant}; its options are: "
            f"{listed(known)}. To change the optimizer, choose its group (optim=adamw)",
        )
    if value is not None:
        check_like(value, names.option_example(optimizer, option), key=key)


def _schedule(config: Config) -> None:
    schedule = config.schedule
    _one_of("schedule.name", schedule.name, names.SCHEDULES)
    if not 0.0 <= schedule.warmup_fraction < 1.0:
        raise Mistake(
            "schedule.warmup_fraction",
            f"schedule.warmup_fraction must be in [0, 1), a part of the run's updates; "
            f"got {schedule.warmup_fraction}",
        )
    fraction = schedule.final_fraction
    if not 0.0 <= fraction <= 1.0:
        raise Mistake(
            "schedule.final_fraction",
            f"schedule.final_fraction must be in [0, 1]: it is a part of optim.lr; got {fraction}",
        )
    if schedule.name == "constant" and fraction != 1.0:
        raise Mistake(
            "schedule.final_fraction",
            "schedule.final_fraction must be 1 with schedule=constant: its rate does not come "
            f"down (schedule=linear or cosine does); got {fraction}",
        )


def _hardware(config: Config) -> None:
    hardware = config.hardware
    _one_of("hardware.name", hardware.name, names.HARDWARE)
    if hardware.devices is not None:
        _at_least("hardware.devices", hardware.devices, 1)
    if hardware.peak_flops_per_s is not None:
        _positive("hardware.peak_flops_per_s", hardware.peak_flops_per_s)


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise Mistake(key, f"{key} must be >= {least}; got {value}")


def _positive(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise Mistake(key, f"{key} must be a finite number above 0; got {value}")


def _one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        meant = did_you_mean(value, allowed)
        raise Mistake(key, f"{key} must be one of {listed(allowed)}; got {value!r}{meant}")
