"""A batch under the runner's own launcher, as Hydra's sweeper hands it over."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence

from omegaconf import DictConfig

from runner.batch.batch import Batch, Note, slot_stations
from runner.batch.job import BatchJob
from runner.batch.ledger import Command, Entry
from runner.batch.queue import JobSource
from runner.batch.session import Station
from runner.batch.summary import finish
from runner.cli.batch import BatchPlan, plan_line
from runner.cli.search import search_text
from runner.config.hardware import hardware_of
from runner.config.schema import HardwareConfig
from runner.record.errors import ExitCode, StopRequested


class Grid:
    """Runs what a sweeper hands over.

    Args:
        plan: The jobs, as far as they are known.
        command: What began the batch.
    """

    def __init__(self, plan: BatchPlan, command: Command) -> None:
        self._plan = plan
        self._batch = Batch(plan.folder, plan.settings, command)

    @property
    def exit_code(self) -> int:
        """0 only if every job succeeded."""
        entries = self._batch.entries.values()
        good = bool(entries) and all(entry.state.good for entry in entries)
        return ExitCode.DONE if good else ExitCode.JOB_FAILED

    def run(self, cfg: DictConfig) -> None:
        """Hydra's task function, which the runner's launcher never calls."""
        raise AssertionError("the runner's launcher starts jobs by their overrides")

    def launch(self, overrides: Sequence[Sequence[str]], first: int) -> list[float]:
        """Run jobs, the first of which is the batch's `first`; returns the metric of each.

        Raises:
            KeyboardInterrupt: The user asked for an end.
            StopRequested: The batch was preempted.
        """
        jobs = self._jobs(overrides, first)
        if first == 0:
            print(plan_line(self._plan), file=sys.stderr)
        hardware = [hardware_of(job.config) for job in jobs]
        with self._stations(hardware) as stations:
            _check(self._batch.run_all(jobs, stations[: max(1, len(jobs))]))
        return [self._value(job) for job in jobs]

    def search(self) -> None:
        """Run the trials of a search.

        Raises:
            KeyboardInterrupt: The user asked for an end.
            StopRequested: The batch was preempted.
            ConfigError: It cannot go on.
        """
        plan = self._plan.search
        assert plan is not None, "the sweeper calls it for a search alone"
        # Imported late: it brings optuna, which nothing else needs.
        from runner.batch.search import open_search

        settings = self._batch.settings

        def make(entries: Mapping[int, Entry], note: Note) -> JobSource:
            search = open_search(plan, self._plan.planner, settings=settings, note=note)
            search.go_on(entries)
            return search

        print(f"{search_text(plan)}\nfolder {self._plan.folder}", file=sys.stderr)
        with self._stations(plan.hardware) as stations:
            _check(self._batch.run(make, stations[: plan.config.n_trials]))

    def show(self) -> None:
        """Print how things stand, and write the batch's files."""
        if self._batch.entries:
            finish(self._batch.entries, self._plan.settings, folder=self._plan.folder)

    @contextlib.contextmanager
    def _stations(self, hardware: Sequence[HardwareConfig]) -> Iterator[Sequence[Station]]:
        """The places where jobs with these `hardware` sections run."""
        settings, folder = self._batch.settings, self._plan.folder
        if self._plan.ray is None:
            yield slot_stations(hardware, settings, folder=folder)
            return
        # Imported late: it brings ray, which nothing else needs.
        from runner.batch.cluster import ray_stations

        with ray_stations(hardware, settings, self._plan.ray, folder=folder) as stations:
            yield stations

    def _jobs(self, overrides: Sequence[Sequence[str]], first: int) -> list[BatchJob]:
        planned = self._plan.jobs[first : first + len(overrides)]
        return planned or [self._plan.planner.job(each) for each in overrides]

    def _value(self, job: BatchJob) -> float:
        metric = self._plan.settings.metric or ""
        return self._batch.entries[job.number].final.get(metric, math.nan)


def _check(code: ExitCode) -> None:
    if code is ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code is ExitCode.PREEMPTED:
        raise StopRequested("the batch was preempted by SIGTERM", exit_code=code)
