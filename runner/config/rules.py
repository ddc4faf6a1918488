"""Rules on values, one function a section. Types are checked before, by `runner.config.typed`."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterable
from typing import Any

from runner.config import names
from runner.config.chips import SLICES
from runner.config.mistakes import Mistake, did_you_mean, listed
from runner.config.parallel import check_parallel
from runner.config.schema import Config, Mode, PassesConfig
from runner.config.trust import check_name
from runner.config.typed import check_like


def check_rules(config: Config) -> None:
    """Every rule, in the order of the sections.

    Raises:
        Mistake: The first rule that is broken.
    """
    rules = (_run, _batch, _backend, _optimizer, _schedule, _hardware, _preflight, check_parallel)
    for rule in (*rules, _checkpoint, _faults, _profile, _sweep):
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
    if name == "eager" and config.hardware.name not in ("auto", "cpu"):
        raise Mistake(
            "hardware.name",
            "hardware.name must be auto or cpu with backend=eager: eager runs on the host; "
            f"got {config.hardware.name!r}",
        )
    _one_of("remat", config.remat, names.REMAT)
    if config.remat != "none" and name != "openxla_step":
        raise Mistake(
            "remat",
            f"remat must be none with backend={name}: only openxla_step computes layers again; "
            f"got {config.remat!r}",
        )
    if config.scan_layers and config.remat != "layers":
        raise Mistake(
            "scan_layers",
            "scan_layers must be false without remat=layers: a loop that kept the inside of each "
            "layer would store far more than the layers one by one; got true, "
            f"remat={config.remat!r}",
        )
    _steps_per_call(config)
    _passes(config)


def _passes(config: Config) -> None:
    """Passes are `openxla_step`'s, and flash attention is one chip's."""
    name, defaults = config.backend.name, dataclasses.asdict(PassesConfig())
    for switch, on in dataclasses.asdict(config.backend.passes).items():
        if name != "openxla_step" and on != defaults[switch]:
            raise Mistake(
                f"backend.passes.{switch}",
                f"backend.passes.{switch} must be {str(defaults[switch]).lower()}, its default, "
                f"with backend={name}: only openxla_step has passes; got {str(on).lower()}",
            )
    if not config.backend.passes.flash_attention:
        return
    key = "backend.passes.flash_attention"
    if config.mode is not Mode.preflight and config.hardware.name == "cpu":
        raise Mistake(
            key,
            f"{key} must be false with hardware=cpu: its kernels run on TPUs only; got true. "
            "mode=preflight hardware=v5e-1 shows whether they compile",
        )
    if config.parallel.name != "single":
        raise Mistake(
            key,
            f"{key} must be false with parallel={config.parallel.name}: its kernels are not cut "
            "over a mesh yet; got true. Use parallel=single",
        )


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
            f"{listed(known)}. To change the optimizer, choose its group (optim=adamw); an option "
            f"that the job's file sets goes by '~{key}'",
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


def _checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    if checkpoint.keep < 2:
        raise Mistake(
            "checkpoint.keep",
            f"checkpoint.keep must be >= 2: the newest may be damaged; got {checkpoint.keep}",
        )
    if checkpoint.every_s is not None:
        _positive("checkpoint.every_s", checkpoint.every_s)
    _at_least("checkpoint.every_steps", checkpoint.every_steps, 0)
    _at_least("checkpoint.keep_every_steps", checkpoint.keep_every_steps, 0)
    _at_least("checkpoint.failures", checkpoint.failures, 1)
    _multiple("checkpoint.every_steps", checkpoint.every_steps, of=config.backend.steps_per_call)
    if checkpoint.keep_every_steps:
        every = checkpoint.every_steps
        if not every or checkpoint.keep_every_steps % every:
            raise Mistake(
                "checkpoint.keep_every_steps",
                "checkpoint.keep_every_steps must be a multiple of checkpoint.every_steps: what "
                f"was not saved cannot be kept; got {checkpoint.keep_every_steps} and {every}",
            )
    root = checkpoint.root
    if root is not None and not ("://" in root or root.startswith("/")):
        raise Mistake(
            "checkpoint.root",
            f"checkpoint.root must be an absolute folder or a URL, because runs start in many "
            f"folders; got {root!r}",
        )
    if config.resume not in ("auto", "never") and config.init_from is not None:
        raise Mistake(
            "init_from",
            "init_from must be null with resume=PATH, which brings the weights along; got "
            f"{config.init_from!r} and {config.resume!r}",
        )


def _faults(config: Config) -> None:
    retries, timeouts = config.retries, config.timeouts
    _at_least("retries.failures", retries.failures, 0)
    _at_least("retries.infrastructure", retries.infrastructure, 0)
    if retries.preemptions is not None:
        _at_least("retries.preemptions", retries.preemptions, 0)
    if not (retries.backoff_s >= 0 and math.isfinite(retries.backoff_s)):
        raise Mistake(
            "retries.backoff_s", f"retries.backoff_s must be >= 0; got {retries.backoff_s}"
        )
    for name in ("start_s", "compile_s", "step_s", "grace_s", "hosts_s"):
        _positive(f"timeouts.{name}", getattr(timeouts, name))


def _multiple(key: str, value: int, *, of: int) -> None:
    if value % of:
        raise Mistake(
            key,
            f"{key} must be a multiple of backend.steps_per_call: between the updates of one call "
            f"there is no state to save; got {value} and {of}; the nearest are "
            f"{nearest_multiples(value, of)}",
        )


def _profile(config: Config) -> None:
    key, steps = "profile.steps", config.profile.steps
    if steps is None:
        return
    least, most = config.backend.steps_per_call + 1, config.steps
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    if not (len(steps) == 2 and whole and least <= steps[0] <= steps[1] <= most):
        raise Mistake(
            key,
            f"{key} must be [first, last], two updates from {least} (what compiles is not traced) "
            f"to steps={most}; got {steps}",
        )
    if config.mode is not Mode.train:
        raise Mistake(key, f"{key} must be null with mode={config.mode.value}: nothing is trained")
    if config.backend.name == "eager":
        raise Mistake(
            key,
            f"{key} must be null with backend=eager: the trace is XLA's; got {steps}. Use another "
            "backend",
        )


def _preflight(config: Config) -> None:
    asked, find = config.preflight, config.preflight.find
    if find is not None:
        _one_of("preflight.find", find, names.FINDABLE)
    if config.mode is not Mode.preflight:
        return
    if config.backend.name != "openxla_step":
        raise Mistake(
            "backend.name",
            "backend.name must be openxla_step with mode=preflight: its step is the program that "
            f"the TPU compiler is asked about; got {config.backend.name!r}",
        )
    hardware = config.hardware
    if hardware.name not in SLICES:
        raise Mistake(
            "hardware.name",
            "hardware.name must be a TPU slice with mode=preflight, such as v5e-8 or v6e-64: the "
            f"compiler is asked about that one; got {hardware.name!r}",
        )
    if hardware.devices not in (None, 1, SLICES[hardware.name].chips):
        raise Mistake(
            "hardware.devices",
            "hardware.devices must be null, for all chips of the slice, or 1 with "
            f"mode=preflight; got {hardware.devices}",
        )
    if asked.find and asked.suggest:
        raise Mistake(
            "preflight.suggest",
            f"preflight.suggest must be false with preflight.find={find}: a batch that fits is "
            "what is searched for; got true",
        )


def check_installed(config: Config) -> None:
    """What a configuration asks for is installed. A stored one is read all the same.

    Raises:
        Mistake: A package is missing; names the extra.
    """
    for name, package in (("mlflow", "mlflow-skinny"), ("wandb", "wandb")):
        if getattr(config.sinks, name) and importlib.util.find_spec(name) is None:
            raise Mistake(
                f"sinks.{name}",
                f"sinks.{name} must be false without {package}, which is not installed: install "
                "the extra `sinks`; got true",
            )


def _sweep(config: Config) -> None:
    batch = config.batch
    if batch.name is not None:
        check_name(batch.name, key="batch.name")
    for name in ("chips_per_job", "max_concurrent"):
        value = getattr(batch, name)
        if value is not None:
            _at_least(f"batch.{name}", value, 1)
    _at_least("batch.retries", batch.retries, 0)
    if batch.time_limit_s is not None:
        _positive("batch.time_limit_s", batch.time_limit_s)
    _one_of("batch.isolation", batch.isolation, names.ISOLATIONS)
    _one_of("batch.best", batch.best, names.BEST)
    _positive("ray.cpus_per_job", config.ray.cpus_per_job)


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
