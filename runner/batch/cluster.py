"""A Ray cluster as places for jobs: the same runs, with their workers on other machines.

What a run is, its attempts, its ledger and its files stay in this process. A machine that is
lost ends an attempt as a preemption does: the next one begins elsewhere, at the newest
checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.batch.fleet import Crew, CrewLost, Fleet, Need, connect, largest_node
from runner.batch.host import Task
from runner.batch.job import BatchJob
from runner.batch.jobstop import JobStop
from runner.batch.seat import Process, Seat
from runner.batch.supervise import RunPlan, supervise
from runner.config.chips import SLICES
from runner.config.schema import BatchConfig, HardwareConfig, RayConfig
from runner.config.trust import TRUST_VARIABLE
from runner.observe.display import Display
from runner.record.checkpoints import share
from runner.record.errors import ConfigError, ExitCode, Fault
from runner.record.events import Alive, Ended, Event, Started, Steps
from runner.record.outcome import Result
from runner.record.signals import SHOW_STACKS

#: Seconds that a machine waits for something to report.
_REPORT_S = 0.5
_STACKS_S = 3.0
#: Variables of this process that a worker elsewhere has too.
_VARIABLES = (TRUST_VARIABLE, "PYTHONPATH")


class RemoteProcess:
    """A worker on a crew: a `Process` for `runner.batch.attempt`.

    Args:
        fleet: Where the crew came from.
        crew: Where the worker runs; the job has begun.
        log: File that takes what it prints.
    """

    def __init__(self, fleet: Fleet, crew: Crew, log: pathlib.Path) -> None:
        self._fleet, self._crew, self._log = fleet, crew, log
        self._events: list[Event] = []
        self._code: int | None = None
        self._step = 0
        self._lost = False

    def events(self) -> Iterator[Event]:
        """The events that have arrived."""
        arrived, self._events = self._events, []
        for event in arrived:
            self._step = _step(event, self._step)
            yield event

    def wait(self, seconds: float = _REPORT_S) -> None:
        """Wait until there is something new, or the job ended, or time is up."""
        if self._code is not None:
            return
        try:
            report = self._crew.poll(seconds)
        except CrewLost as lost:
            self._lose(lost)
            return
        if report.log:
            with open(self._log, "ab") as file:
                file.write(report.log)
        self._events += report.events
        self._code = report.exit_code

    def exit_code(self) -> int | None:
        """The job's exit code; None while it runs."""
        return self._code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker, if it still runs."""
        if self._code is not None:
            return
        with self._guarded():
            self._crew.signal(int(number))
        deadline = time.monotonic() + _STACKS_S
        while number == SHOW_STACKS and time.monotonic() < deadline:
            self.wait()

    def kill(self) -> None:
        """End the job, if it still runs."""
        if self._code is None:
            with self._guarded():
                self._crew.kill()
        while self._code is None:
            self.wait()

    def close(self) -> None:
        """Give the crew back."""
        if not self._lost:
            with self._guarded():
                self._crew.finish()
        self._fleet.give_back(self._crew, good=not self._lost)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except CrewLost as lost:
            self._lose(lost)

    def _lose(self, lost: CrewLost) -> None:
        self._lost = True
        if self._code is None:
            self._code = int(ExitCode.PREEMPTED)
            step = max((_step(event, 0) for event in self._events), default=self._step)
            reason = f"its machine was lost: {lost}"
            self._events.append(Ended(self._code, reason, step, Fault.PREEMPTION.value))


class EndedProcess:
    """A worker that never began: a `Process` that says why."""

    def __init__(self, code: int, reason: str, fault: str) -> None:
        self._events: list[Event] = [Ended(code, reason, 0, fault)]
        self._code = code

    def events(self) -> Iterator[Event]:
        """Its last word."""
        arrived, self._events = self._events, []
        yield from arrived

    def wait(self, seconds: float = _REPORT_S) -> None:
        """There is nothing to wait for."""

    def exit_code(self) -> int | None:
        """What it ended with."""
        return self._code

    def signal(self, number: signal.Signals) -> None:
        """There is nobody to hear it."""

    def kill(self) -> None:
        """It has ended."""

    def close(self) -> None:
        """It holds nothing."""


class RayStation:
    """Sees jobs through on machines of a cluster, one at a time.

    Args:
        fleet: Lends the machines.
        number: From 0.
        batch_folder: What TensorBoard is started on.
        warm: Whether jobs of one graph share a process.
    """

    def __init__(
        self, fleet: Fleet, number: int, *, batch_folder: pathlib.Path, warm: bool
    ) -> None:
        self.name = "the cluster"
        self.key: str | None = None
        self._fleet, self._number = fleet, number
        self._batch_folder = batch_folder
        self._warm = warm

    def run(
        self, job: BatchJob, *, display: Display, stop: JobStop, following: BatchJob | None
    ) -> Result:
        """See a job through; where the next one will be is the cluster's affair.

        Raises:
            RunnerError: It cannot be started.
        """
        plan = RunPlan(
            overrides=list(job.overrides),
            config_yaml=job.config_yaml,
            tensorboard_root=self._batch_folder,
        )
        start = functools.partial(self._start, job, stop)
        self.key = job.key
        seat = Seat(display, stop, start, elsewhere=True)
        return supervise(job.config, job.run_dir, plan=plan, seat=seat)

    def close(self) -> None:
        """The crew that is left goes to others, or ends with the fleet."""

    def _start(
        self,
        job: BatchJob,
        stop: JobStop,
        request: Mapping[str, Any],
        environment: Mapping[str, str],
        log: pathlib.Path,
    ) -> Process:
        place, began = str(request["checkpoints"]), time.monotonic()
        share(place)
        crew = self._fleet.acquire(job.key, asked=lambda: stop.asked)
        if crew is None:
            code = ExitCode.PREEMPTED if stop.terminated else ExitCode.INTERRUPTED
            said = "stopped while it waited for a machine of the cluster"
            return EndedProcess(int(code), said, Fault.FINAL.value)
        stop.excuse(time.monotonic() - began)
        task = Task(
            request=request,
            key=job.key,
            warm=self._warm,
            variables={name: os.environ[name] for name in _VARIABLES if name in os.environ},
            folder=os.getcwd(),
        )
        return self._begin(crew, task, log)

    def _begin(self, crew: Crew, task: Task, log: pathlib.Path) -> Process:
        try:
            with open(log, "a") as file:
                file.write(f"on {', '.join(crew.names())}\n")
            refusal = crew.begin(task)
        except CrewLost as lost:
            self._fleet.give_back(crew, good=False)
            reason = f"its machine was lost before it began: {lost}"
            return EndedProcess(int(ExitCode.PREEMPTED), reason, Fault.PREEMPTION.value)
        if refusal is not None:
            self._fleet.give_back(crew, good=True)
            return EndedProcess(*refusal)
        return RemoteProcess(self._fleet, crew, log)


@contextlib.contextmanager
def ray_stations(
    hardware: Sequence[HardwareConfig],
    settings: BatchConfig,
    config: RayConfig,
    *,
    folder: pathlib.Path,
) -> Iterator[list[RayStation]]:
    """The places of a cluster, for jobs with these `hardware` sections, while it is open.

    Raises:
        ConfigError: There is no cluster at `ray.address`, or the jobs need unlike machines.
    """
    from runner.batch.fleet import disconnect

    has = connect(config.address)
    try:
        need = need_of(hardware, settings, config, tpu=has.get("TPU", 0) > 0)
        room = has.get("TPU", 0.0) / need.chips if need.chips else has.get("CPU", 0.0) / need.cpus
        hosts = need.slice.hosts if need.slice else 1
        most = settings.max_concurrent or max(1, int(room / hosts))
        _warn_of_too_much(need)
        fleet = Fleet(need, most=most)
        warm = settings.isolation == "warm"
        try:
            yield [
                RayStation(fleet, number, batch_folder=folder, warm=warm) for number in range(most)
            ]
        finally:
            fleet.close()
    finally:
        disconnect()


def need_of(
    hardware: Sequence[HardwareConfig], settings: BatchConfig, config: RayConfig, *, tpu: bool
) -> Need:
    """What a job asks the cluster for.

    Args:
        hardware: The `hardware` sections of the jobs.
        settings: The `batch` section.
        config: The `ray` section.
        tpu: Whether the cluster has TPU chips, which `hardware=auto` takes then.

    Raises:
        ConfigError: Two jobs ask for different things.
    """
    needs = {_need(each, settings, config, tpu=tpu) for each in hardware}
    if len(needs) > 1:
        raise ConfigError(
            "hardware must be of one kind for all jobs of a batch on a cluster; got "
            f"{sorted({each.name for each in hardware})}"
        )
    return needs.pop()


def _need(hardware: HardwareConfig, settings: BatchConfig, config: RayConfig, *, tpu: bool) -> Need:
    if hardware.name == "cpu" or (hardware.name == "auto" and not tpu):
        return Need(cpus=config.cpus_per_job, chips=0)
    named = SLICES.get(hardware.name)
    chips = settings.chips_per_job or hardware.devices
    if named is None or chips is not None:
        return Need(cpus=0, chips=chips or 1)
    return Need(cpus=0, chips=named.chips_per_host, slice=named if named.hosts > 1 else None)


def _warn_of_too_much(need: Need) -> None:
    name, wanted = ("TPU", float(need.chips)) if need.chips else ("CPU", need.cpus)
    largest = largest_node(name)
    if largest < wanted:
        print(
            f"runner: no machine of the cluster has {wanted:g} {name} (the most is {largest:g}): "
            "jobs wait until one comes; Ctrl-C ends the batch",
            file=sys.stderr,
        )


def _step(event: Event, before: int) -> int:
    if isinstance(event, Steps):
        return event.records[-1].step if event.records else before
    if isinstance(event, Alive):
        return event.step
    return event.first_step if isinstance(event, Started) else before
