"""A search as a source of jobs: each trial is a job, the trial's number is the job's.

The study is told of a trial after the ledger is: what a batch that was killed did not tell, it
tells when it goes on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from optuna.trial import Trial

from runner.batch.job import BatchJob
from runner.batch.ledger import Entry
from runner.batch.plan import Planner
from runner.batch.queue import Retries, first_with
from runner.batch.study import Study
from runner.config.mistakes import listed
from runner.config.schema import BatchConfig
from runner.config.search import SearchPlan, Space, Value
from runner.observe.metrics import Point
from runner.record.errors import ConfigError
from runner.record.outcome import State


@dataclasses.dataclass(frozen=True)
class Aim:
    """What a search wants.

    Attributes:
        metric: What trials are compared by.
        trials: How many there are, in all.
        reports: How often in its life a trial is compared.
        retries: How often a job that failed is put at the end again.
    """

    metric: str
    trials: int
    reports: int
    retries: int


def open_search(
    plan: SearchPlan, planner: Planner, *, settings: BatchConfig, note: Callable[[Entry], None]
) -> Search:
    """The search of a batch; what its folder holds of it is not taken up yet.

    Raises:
        ConfigError: The folder holds another search.
    """
    metric, largest = settings.metric or "", settings.best == "max"
    study = Study(planner.folder, plan.space, config=plan.config, metric=metric, largest=largest)
    aim = Aim(metric, plan.config.n_trials, plan.config.prune_reports, settings.retries)
    return Search(study, plan.space, planner, aim=aim, note=note)


class Search:
    """Hands out the trials of a study as jobs.

    Args:
        study: Chooses them.
        space: Makes overrides of their values.
        planner: Makes jobs of those.
        aim: What is wanted.
        note: Called with the entry of each job that the batch did not have, or has again.
    """

    def __init__(
        self,
        study: Study,
        space: Space,
        planner: Planner,
        *,
        aim: Aim,
        note: Callable[[Entry], None],
    ) -> None:
        self._study, self._space, self._planner = study, space, planner
        self._aim, self._note = aim, note
        self._trials: dict[int, Trial] = {}
        self._reported: dict[int, int] = {}
        self._waiting: list[BatchJob] = []
        self._retries = Retries(aim.retries)
        self._asked = 0

    def go_on(self, entries: Mapping[int, Entry]) -> None:
        """Take up the trials of earlier processes, whose jobs have these entries.

        Raises:
            ConfigError: They were of another configuration.
        """
        for trial, values, over in self._study.trials():
            self._asked += 1
            known = entries.get(trial.number)
            job = self._job(trial, values, known=known)
            if over or job is None:
                self._forget(trial, known, over=over)
                continue
            self._trials[trial.number] = trial
            self._note(job.entry)
            if job.done:
                self._tell(job, job.entry)
            else:
                self._waiting.append(job)

    def take(self, key: str | None) -> BatchJob | None:
        """A trial that waits, or else a new one."""
        if self._waiting:
            return self._waiting.pop(first_with(key, self._waiting))
        while self._asked < self._aim.trials:
            trial, values = self._study.ask(self._asked)
            self._asked += 1
            job = self._job(trial, values, known=None)
            if job is not None:
                self._trials[trial.number] = trial
                self._note(job.entry)
                return job
            self._study.failed(trial)
        return None

    def peek(self, key: str | None) -> BatchJob | None:
        """A trial that waits; a new one is chosen when the one before it has ended."""
        return self._waiting[first_with(key, self._waiting)] if self._waiting else None

    def watch(self, job: BatchJob, point: Point) -> str:
        """Compare a trial with those before it, at even distances of its life."""
        value = point.values.get(self._aim.metric)
        steps, reports = job.config.steps, self._aim.reports
        number = point.step * reports // steps
        if value is None or not self._reported.get(job.number, 0) < number < reports:
            return ""
        self._reported[job.number] = number
        trial, step = self._trials[job.number], number * steps // reports
        if not self._study.is_hopeless(trial, step=step, value=value):
            return ""
        # What it still says before it has stopped would make the search hang on timing.
        self._reported[job.number] = reports
        return (
            f"pruned at step {point.step}: {self._aim.metric} {value:.6g} is worse than the "
            "median of the trials before it"
        )

    def ended(self, job: BatchJob, entry: Entry) -> None:
        """Tell the study, unless the trial is tried again or goes on another day.

        Raises:
            ConfigError: The job does not report the metric.
        """
        if self._retries.again(job.number, entry):
            self._waiting.append(job)
        elif entry.state not in (State.CANCELLED, State.PREEMPTED):
            self._tell(job, entry)

    def _tell(self, job: BatchJob, entry: Entry) -> None:
        trial, metric = self._trials.pop(job.number), self._aim.metric
        self._reported.pop(job.number, None)
        value = entry.final.get(metric, math.nan)
        if entry.state is State.PRUNED:
            self._study.pruned(trial)
        elif entry.state is State.SUCCEEDED and math.isfinite(value):
            self._study.succeeded(trial, value)
        else:
            self._study.failed(trial)
        if entry.state is State.SUCCEEDED and metric not in entry.final:
            raise ConfigError(
                f"batch.metric must be one that the jobs report: {listed(sorted(entry.final))}; "
                f"got {metric!r}, which job {job.number} ended without"
            )

    def _forget(self, trial: Trial, known: Entry | None, *, over: bool) -> None:
        """A trial of an earlier process that will not be run."""
        if known is not None:
            self._note(known)
        if not over:
            self._study.failed(trial)

    def _job(
        self, trial: Trial, values: Mapping[str, Value], *, known: Entry | None
    ) -> BatchJob | None:
        """The job of a trial; None, and an entry that says why, if its configuration is wrong."""
        lines = self._space.lines(values)
        try:
            job = self._planner.job(lines)
        except ConfigError as error:
            if known is None:
                self._note(self._planner.refused(lines, error))
            return None
        changed = known is not None and known.hash != job.entry.hash
        if job.number != trial.number or changed:
            raise ConfigError(
                f"{self._planner.folder} holds a search of another configuration: go on with "
                "the same overrides, or choose another folder (batch.name)"
            )
        return job
