"""A batch before it starts: which jobs it consists of, whether each is valid, where they go."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncherConf
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.batch.job import BatchJob
from runner.batch.plan import Planner, known_entries, shared_settings
from runner.cli.plugins import GRID_SWEEPER, LAUNCHERS, RAY_LAUNCHER, SEARCH_SWEEPER
from runner.cli.search import plan_search, search_text
from runner.config.compose import Composer
from runner.config.hydra_words import explained
from runner.config.schema import BatchConfig, RayConfig
from runner.config.search import SearchPlan
from runner.config.typed import build
from runner.config.validate import plain
from runner.record.errors import ConfigError
from runner.record.outcome import State

_GRIDS = (GRID_SWEEPER, BasicSweeperConf._target_)
_NO_TERMINAL_WIDTH = 160


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """What a batch will do.

    Attributes:
        folder: Its folder.
        jobs: Its jobs; empty where a sweeper chooses them as it goes.
        settings: The `batch` section.
        planner: Makes further jobs.
        ours: Whether the runner's own launcher runs them.
        search: What chooses its jobs, or None for a grid.
        ray: The cluster that it runs on, or None for this machine.
    """

    folder: pathlib.Path
    jobs: list[BatchJob]
    settings: BatchConfig
    planner: Planner
    ours: bool
    search: SearchPlan | None = None
    ray: RayConfig | None = None


def plan_batch(composer: Composer, overrides: Sequence[str]) -> BatchPlan:
    """Every job of the batch, composed and valid; nothing is started or written.

    A search chooses its jobs as it goes: jobs at the ends of its space are checked. The jobs
    of other sweepers are checked one by one, as they come.

    Raises:
        ConfigError: A job is wrong, and which; or there is none.
    """
    whole = composer.batch(overrides)
    hydra, settings = whole.hydra, build(BatchConfig, plain(whole.batch), path="batch")
    ours = hydra.launcher.get("_target_") in LAUNCHERS
    if not ours and hydra.launcher.get("_target_") != BasicLauncherConf._target_:
        raise ConfigError(
            "hydra/launcher must be runner, ray or basic: the runner starts each job in a child "
            f"process of its own and must see how it ends; got {hydra.launcher.get('_target_')!r}"
        )
    ray = _cluster(whole)
    folder = pathlib.Path(str(hydra.sweep.dir)).absolute()
    entries = known_entries(folder, resume=settings.resume) if ours else {}
    swept = {one.key_or_group for one in composer.parse(overrides) if one.is_sweep_override()}
    planner = Planner(composer, hydra, folder=folder, entries=entries, swept=swept)
    jobs: list[BatchJob] = []
    if hydra.sweeper.get("_target_") == SEARCH_SWEEPER:
        trial = Planner(composer, hydra, folder=folder, entries={})
        search, settings = plan_search(composer, hydra, overrides, planner=trial, ours=ours)
        return BatchPlan(folder, jobs, settings, planner, ours, search, ray)
    if hydra.sweeper.get("_target_") in _GRIDS:
        jobs = _jobs(planner, _runs(composer, overrides, hydra), overrides)
        settings = shared_settings(jobs)
    return BatchPlan(folder, jobs, settings, planner, ours, None, ray)


def _cluster(whole: DictConfig) -> RayConfig | None:
    config = build(RayConfig, plain(whole.ray), path="ray")
    if whole.hydra.launcher.get("_target_") != RAY_LAUNCHER:
        if config != RayConfig():
            raise ConfigError(f"ray.* has an effect with hydra/launcher=ray only; got {config}")
        return None
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("hydra/launcher=ray needs ray: install the extra `ray`")
    return config


def show_plan(plan: BatchPlan) -> None:
    """Print what a batch would do."""
    if plan.search is not None:
        print(f"{search_text(plan.search)}\nfolder {plan.folder}; nothing was started (dry_run)")
        return
    table = Table(box=box.SIMPLE)
    for heading in ("job", "overrides", "folder", "state"):
        table.add_column(heading, overflow="fold")
    for job in plan.jobs:
        state = "done" if job.done else "goes on" if job.entry.tries else "new"
        table.add_row(str(job.number), Text(job.label), Text(job.entry.folder), state)
    Console(width=None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH).print(table)
    print(f"{plan_line(plan)}; nothing was started (dry_run)", flush=True)


def plan_line(plan: BatchPlan) -> str:
    """How much a batch would do, in one line."""
    left = [job for job in plan.jobs if not job.done]
    graphs = len({job.key for job in left})
    done = len(plan.jobs) - len(left)
    parts = [f"{len(plan.jobs)} jobs", f"{len(left)} to run with {graphs} different graphs"]
    if done:
        parts.append(f"{done} {State.SUCCEEDED.value} before")
    return f"{', '.join(parts)}; folder {plan.folder}"


def _jobs(
    planner: Planner, runs: Sequence[Sequence[str]], overrides: Sequence[str]
) -> list[BatchJob]:
    if not runs:
        raise ConfigError(f"the batch has no jobs: {' '.join(overrides)} gives no value to run")
    jobs = []
    for number, run in enumerate(runs):
        try:
            jobs.append(planner.job(run))
        except ConfigError as error:
            if len(runs) == 1:
                raise
            raise ConfigError(f"job {number} of 0 to {len(runs) - 1}: {error}") from error
    return jobs


def _runs(composer: Composer, overrides: Sequence[str], hydra: DictConfig) -> list[tuple[str, ...]]:
    params = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    parsed = composer.parse([*params, *overrides])
    settings = [item.input_line or "" for item in parsed if item.is_hydra_override()]
    swept = [item for item in parsed if not item.is_hydra_override()]
    try:
        (runs,) = BasicSweeper.split_arguments(swept, None)
    except HydraException as error:
        raise explained(error, composer.options) from error
    return [(*settings, *run) for run in runs]
