"""A search before it starts: its space, whether the jobs at its ends are valid, what it says."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from omegaconf import DictConfig

from runner.batch.plan import Planner, shared_settings
from runner.config.compose import Composer
from runner.config.hardware import hardware_of
from runner.config.mistakes import Mistake, listed
from runner.config.schema import BatchConfig
from runner.config.search import Dimension, SearchConfig, SearchPlan, space_of
from runner.config.typed import build
from runner.config.validate import plain
from runner.record.errors import ConfigError


def plan_search(
    composer: Composer,
    hydra: DictConfig,
    overrides: Sequence[str],
    *,
    planner: Planner,
    ours: bool,
) -> tuple[SearchPlan, BatchConfig]:
    """The search that was asked for, and its `batch` section.

    Args:
        composer: Reads the overrides.
        hydra: Hydra's section.
        overrides: What was asked for.
        planner: Makes jobs that are looked at and thrown away.
        ours: Whether the runner's own launcher runs the jobs.

    Raises:
        ConfigError: The space or a setting is wrong, or a job at an end of the space is.
    """
    config = _config(hydra)
    if not ours:
        raise ConfigError("hydra/sweeper=optuna needs hydra/launcher=runner, which sees its metric")
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("hydra/sweeper=optuna needs optuna: install the extra `search`")
    params = [f"{key}={value}" for key, value in (config.params or {}).items()]
    space = space_of(composer.parse([*params, *overrides]))
    jobs = [planner.job(corner) for corner in space.corners()]
    settings = shared_settings(jobs)
    if settings.metric is None:
        raise ConfigError(
            "batch.metric must be given with hydra/sweeper=optuna: it is what trials are compared "
            "by, such as eval/loss or train/loss; batch.best=max if more of it is better"
        )
    hardware = tuple(dict.fromkeys(hardware_of(job.config) for job in jobs))
    at_end = settings.metric.startswith("eval/") and not any(job.config.eval_every for job in jobs)
    return SearchPlan(space, config, hardware, at_end=settings.metric if at_end else ""), settings


def search_text(plan: SearchPlan) -> str:
    """What a search will do, a line for each key."""
    config = plan.config
    lines = [f"  {_described(each)}" for each in plan.space.dimensions]
    pruned = "trials worse than the median are pruned" if config.prune else "no trial is pruned"
    if config.prune and plan.at_end:
        pruned = (
            f"no trial will be pruned: {plan.at_end} is reported at the end only; set eval_every "
            "to compare trials on the way"
        )
    return "\n".join([f"search of {config.n_trials} trials over:", *lines, pruned])


def _config(hydra: DictConfig) -> SearchConfig:
    values = {key: value for key, value in plain(hydra.sweeper).items() if key != "_target_"}
    try:
        config = build(SearchConfig, values, path="hydra.sweeper")
    except Mistake as mistake:
        raise ConfigError(str(mistake)) from mistake
    config.check()
    return config


def _described(each: Dimension) -> str:
    if each.choices:
        return f"{each.key}: {listed(each.choices)}"
    kind = "whole numbers" if each.whole else "numbers"
    step = f", {each.step:g} apart" if each.step not in (None, 1) else ""
    return f"{each.key}: {kind} {each.low:g} to {each.high:g}{step}{', log' if each.log else ''}"
