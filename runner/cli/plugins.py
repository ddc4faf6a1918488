"""The runner's own Hydra plugins: the launcher that `-m` takes by default, and its sweeper.

Hydra accepts a plugin only from a module whose name begins with `hydra_plugins.`, and finds
none in an editable install: the classes say that they are from one, and are registered by hand.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

_MODULE = "hydra_plugins.runner"
RAY_LAUNCHER = f"{_MODULE}.RayLauncher"
LAUNCHERS = (f"{_MODULE}.RunnerLauncher", RAY_LAUNCHER)
GRID_SWEEPER = f"{_MODULE}.GridSweeper"
SEARCH_SWEEPER = f"{_MODULE}.OptunaSweeper"


class LaunchesJobs(Protocol):
    """What owns the task function that Hydra was given, and can run many at once."""

    def launch(self, jobs: Sequence[Sequence[str]], first: int) -> list[float]:
        """Run jobs by their overrides, the first of which is the batch's `first`.

        Returns:
            The metric of each job; NaN for one that has none.
        """

    def search(self) -> None:
        """Run the trials of the search that was planned."""


class RunnerLauncher(Launcher):
    """Hands the jobs of a sweep to the command line's own batch."""

    __module__ = _MODULE

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember whose task function it is: that is all of Hydra that a batch needs."""
        self._owner: LaunchesJobs = task_function.__self__  # type: ignore[attr-defined]

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs; a sweeper sees the metric of each."""
        values = self._owner.launch(job_overrides, initial_job_idx)
        returns = []
        for overrides, value in zip(job_overrides, values, strict=True):
            done = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
            done.return_value = value
            returns.append(done)
        return returns


class RayLauncher(RunnerLauncher):
    """The same for a batch on a Ray cluster: the plan says where it runs."""

    __module__ = _MODULE


class GridSweeper(Sweeper):
    """Every combination of the values given, as Hydra's basic sweeper has them.

    The jobs were checked before; Hydra's own would compose each anew first, at 0.1 s each.

    Args:
        max_batch_size: Jobs that the launcher is handed at a time; None hands it all.
        params: Further overrides.
    """

    __module__ = _MODULE

    def __init__(self, max_batch_size: int | None, params: Mapping[str, str] | None) -> None:
        self._max_batch_size = max_batch_size
        self._params = params or {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher."""
        self.config, self._loader = config, hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Hand the jobs to the launcher."""
        params = [f"{key}={value}" for key, value in self._params.items()]
        parser = OverridesParser.create(config_loader=self._loader)
        overrides = parser.parse_overrides([*params, *arguments])
        chunks = BasicSweeper.split_arguments(overrides, self._max_batch_size)
        returns, first = [], 0
        for jobs in chunks:
            returns.append(self._launcher.launch(jobs, initial_job_idx=first))
            first += len(jobs)
        return returns


class OptunaSweeper(Sweeper):
    """Hands the search over as a whole: what is next hangs on what has ended, on any slot.

    Args:
        settings: `runner.config.search.SearchConfig`, which the plan was made with.
    """

    __module__ = _MODULE

    def __init__(self, **settings: Any) -> None:
        """The plan has them."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember whose task function it is."""
        self._owner: LaunchesJobs = task_function.__self__  # type: ignore[attr-defined]

    def sweep(self, arguments: list[str]) -> None:
        """Run the search."""
        self._owner.search()


def register() -> None:
    """Make the plugins known to Hydra."""
    plugins: Any = Plugins.instance()
    module = types.ModuleType(_MODULE)
    for cls in _PLUGINS:
        plugins.register(cls)
        setattr(module, cls.__name__, cls)
    # Hydra turns the class back into its name, and looks that up.
    try:
        importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
    sys.modules[_MODULE] = module


_PLUGINS = (RunnerLauncher, RayLauncher, GridSweeper, OptunaSweeper)
