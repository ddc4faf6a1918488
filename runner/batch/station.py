"""A slot of this machine as a place for jobs."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from runner.batch.child import start_child
from runner.batch.job import BatchJob
from runner.batch.jobstop import JobStop
from runner.batch.seat import Process, Seat
from runner.batch.slots import Slot
from runner.batch.supervise import RunPlan, supervise
from runner.batch.workers import WarmWorker
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
        self._worker = WarmWorker(slot.environment) if warm else None

    @property
    def key(self) -> str | None:
        """The graph that a job finds compiled here, if there is one."""
        return self._worker.key if self._worker else None

    def run(self, job: BatchJob, *, display: Display, stop: JobStop) -> Result:
        """See a job through.

        Raises:
            RunnerError: It cannot be started.
        """
        seat = Seat(display, stop, functools.partial(self._start, job))
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
        request: Mapping[str, Any],
        environment: Mapping[str, str],
        log: pathlib.Path,
    ) -> Process:
        wanted = {**request, "cores": self._slot.cores}
        if self._worker is not None:
            return self._worker.lend(wanted, environment, log, key=job.key)
        return start_child(wanted, {**environment, **self._slot.environment}, log)
