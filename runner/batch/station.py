"""A slot of this machine as a place for jobs."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from runner.batch.job import BatchJob
from runner.batch.jobstop import JobStop
from runner.batch.seat import Process, Seat
from runner.batch.slots import Slot
from runner.batch.standby import Standby
from runner.batch.supervise import RunPlan, supervise
from runner.batch.workers import WarmWorker
from runner.config.schema import Mode
from runner.observe.display import Display
from runner.record.errors import ExitCode
from runner.record.outcome import Result


class SlotStation:
    """Sees jobs through in processes of this machine, one at a time.

    Args:
        slot: The part of the machine.
        batch_folder: What TensorBoard is started on.
        warm: Whether jobs of one graph share a process.
    """

    def __init__(self, slot: Slot, *, batch_folder: pathlib.Path, warm: bool) -> None:
        self.name = slot.name
        self._slot = slot
        self._batch_folder = batch_folder
        self._standby = Standby()
        self._worker = WarmWorker(self._standby) if warm else None

    @property
    def key(self) -> str | None:
        """The graph that a job finds compiled here, if there is one."""
        return self._worker.key if self._worker else None

    def run(
        self, job: BatchJob, *, display: Display, stop: JobStop, following: BatchJob | None
    ) -> Result:
        """See a job through; have a process ready for the next one if that will need its own.

        Raises:
            RunnerError: It cannot be started.
        """
        seat = Seat(display, stop, functools.partial(self._start, job, following))
        result = self._supervise(job, seat)
        shared = self._worker is not None and self._worker.jobs > 1
        if shared and result.exit_code == ExitCode.DEVICE and not stop.asked:
            assert self._worker is not None
            self._worker.retire()
            display.notice("no memory left in a process that others used; trying a new one")
            result = self._supervise(job, seat)
        return result

    def close(self) -> None:
        """Let the process go."""
        if self._worker is not None:
            self._worker.retire()
        self._standby.dismiss()

    def _supervise(self, job: BatchJob, seat: Seat) -> Result:
        plan = RunPlan(
            overrides=list(job.overrides),
            config_yaml=job.config_yaml,
            tensorboard_root=self._batch_folder,
        )
        return supervise(job.config, job.run_dir, plan=plan, seat=seat)

    def _start(
        self,
        job: BatchJob,
        following: BatchJob | None,
        request: Mapping[str, Any],
        environment: Mapping[str, str],
        log: pathlib.Path,
    ) -> Process:
        wanted = {**request, "cores": self._slot.cores}
        variables = {**environment, **self._slot.environment}
        process: Process
        if self._worker is not None:
            xla = _wants_xla(job)
            process = self._worker.lend(wanted, variables, log, key=job.key, loaded=xla)
        else:
            process = child = self._standby.child(variables, log)
            child.send({**wanted, "log": str(log)})
            child.no_more()
        if following is not None and following.key != self.key:
            # With a process for each job nothing is to compute beside one.
            load = self._worker is not None and _wants_xla(following)
            self._standby.prepare(variables, load=load)
        return process


def _wants_xla(job: BatchJob) -> bool:
    """Whether torch_xla may be loaded before it: a verdict may be known, eager is without XLA."""
    return job.config.mode is not Mode.preflight and job.config.backend.name != "eager"
