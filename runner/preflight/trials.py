"""Other configurations than the one that was asked for: what may help, and what is the most.

Knows which settings save memory; whether they do is for a judge to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from runner.config.mistakes import Mistake
from runner.config.parallel import check_parallel, stated_devices
from runner.config.schema import Config, ParallelConfig, Precision
from runner.record.errors import RunnerError
from runner.record.preflight import PreflightReport, Trial

Judge = Callable[[Config], PreflightReport]

#: Compiles that a search may cost: each can take minutes.
_MOST = 16


@dataclasses.dataclass(frozen=True)
class Change:
    """A configuration that needs less memory, as an override and in full."""

    override: str
    why: str
    config: Config


def changes(config: Config) -> Iterator[Change]:
    """What may make a job fit that does not, the mildest first; nothing that breaks a rule."""
    return (change for change in _candidates(config) if _is_allowed(change.config))


def _is_allowed(config: Config) -> bool:
    """Whether everything that is cut over the mesh divides by it."""
    try:
        check_parallel(config)
    except Mistake:
        return False
    return True


def _candidates(config: Config) -> Iterator[Change]:
    if config.precision is Precision.float32:
        bf16 = dataclasses.replace(config, precision=Precision.bf16)
        yield Change("precision=bf16", "activations take half the memory", bf16)
    together, overrides = config, []
    for override, why, fields in _same_update(config):
        change = Change(override, why, dataclasses.replace(config, **fields))
        if _is_allowed(change.config):
            yield change
            together = dataclasses.replace(together, **fields)
            overrides.append(override)
    if len(overrides) > 1:
        yield Change(" ".join(overrides), "all that leaves the update the same", together)
    if config.job.batch_size % (2 * config.accumulate_steps) == 0:
        size = config.job.batch_size // 2
        yield Change(f"job.batch_size={size}", "half the activations", with_batch(config, size))


def _same_update(config: Config) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Changes to the same numbers in less memory: override, reason, fields."""
    if config.remat == "none":
        why = "layers are computed again in the backward pass"
        yield "remat=layers", why, {"remat": "layers"}
    chips = stated_devices(config) or 1
    if chips > 1 and config.parallel.name in ("single", "data"):
        why = f"parameters and the optimizer's state are cut over the {chips} chips"
        yield "parallel=fsdp", why, {"parallel": ParallelConfig("fsdp")}
    parts = 2 * config.accumulate_steps
    if config.job.batch_size % parts == 0:
        why = "the same update from smaller micro-batches"
        yield f"accumulate_steps={parts}", why, {"accumulate_steps": parts}


def with_batch(config: Config, size: int) -> Config:
    """The configuration with another batch size."""
    return dataclasses.replace(config, job=dataclasses.replace(config.job, batch_size=size))


def suggestions(config: Config, judge: Judge | None) -> list[Trial]:
    """What to try, each compiled if there is a judge."""
    return [_tried(change, judge) for change in changes(config)]


def _tried(change: Change, judge: Judge | None) -> Trial:
    trial = Trial(change.override, change.why)
    if judge is None:
        return trial
    try:
        return _outcome(trial, judge(change.config))
    except RunnerError as error:
        return dataclasses.replace(trial, why=str(error))


def _outcome(trial: Trial, report: PreflightReport) -> Trial:
    return dataclasses.replace(
        trial,
        fits=report.fits,
        total=report.hbm.total,
        step_s=report.estimate.step_s if report.estimate else 0.0,
    )


def largest_batch(
    config: Config, first: PreflightReport, judge: Judge, *, multiple: int
) -> tuple[PreflightReport, list[Trial]]:
    """Searches for the largest batch that fits.

    Memory is close to a straight line over the batch size, so the line through what is known
    says where to look next; a bracket around the answer keeps the search honest.

    Args:
        config: The configuration to start from.
        first: Its report.
        judge: Compiles another.
        multiple: What a batch size must be a multiple of.

    Returns:
        The report of the largest that fits (of the smallest that was tried, if none does) and
        every batch size that was compiled.
    """
    reports = {config.job.batch_size: first}
    capacity = first.hbm.capacity
    while len(reports) < _MOST:
        size = _next(reports, capacity, multiple)
        if size is None:
            break
        reports[size] = judge(with_batch(config, size))
    fitting = [size for size, report in reports.items() if report.fits]
    best = max(fitting) if fitting else min(reports)
    trials = [_outcome(Trial(f"job.batch_size={s}"), reports[s]) for s in sorted(reports)]
    return reports[best], trials


def _next(reports: dict[int, PreflightReport], capacity: int, multiple: int) -> int | None:
    """The batch size to compile next, or None at the end."""
    fitting = [size for size, report in reports.items() if report.fits]
    failing = [size for size, report in reports.items() if not report.fits]
    low, high = max(fitting, default=0), min(failing, default=0)
    if high and high - low <= multiple:
        return None
    guess = _on_line(reports, capacity)
    if guess is None:
        guess = 2 * low if not high else (low + high) / 2
    size = max(multiple, int(guess) // multiple * multiple)
    if size <= low:
        size = low + multiple
    if high and size >= high:
        size = high - multiple
    return None if size in reports else size


def _on_line(reports: dict[int, PreflightReport], capacity: int) -> float | None:
    """Where the line through the two sizes nearest to the capacity meets it."""
    nearest = sorted(reports, key=lambda size: abs(reports[size].hbm.total - capacity))[:2]
    if len(nearest) < 2:
        return None
    one, two = nearest
    slope = (reports[two].hbm.total - reports[one].hbm.total) / (two - one)
    if slope <= 0:
        return None
    return one + (capacity - reports[one].hbm.total) / slope
