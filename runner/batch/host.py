"""A machine of a cluster as its driver sees it: starts workers there, one at a time.

Runs inside a Ray actor and knows nothing of Ray. All that must be the same on both machines is
the installed runner; only checkpoints are shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import platform
import signal
import tempfile
from collections.abc import Mapping
from typing import Any

from runner.batch.child import start_child
from runner.batch.seat import Process
from runner.batch.slots import chip_environment
from runner.batch.standby import Standby
from runner.batch.workers import WarmWorker
from runner.config import hosts
from runner.config.chips import SLICES
from runner.config.codec import config_from_json
from runner.config.hardware import find_hardware
from runner.config.schema import Config
from runner.record.checkpoints import check_shared
from runner.record.errors import RunnerError
from runner.record.events import Event

_VISIBLE = "TPU_VISIBLE_CHIPS"


@dataclasses.dataclass(frozen=True)
class Task:
    """A job for a worker.

    Attributes:
        request: What the worker is sent.
        key: The job's graph.
        warm: Whether a process that has it compiled may take the job.
        variables: Environment variables of the driver that hold here too.
        folder: The folder that the driver was started in.
    """

    request: Mapping[str, Any]
    key: str
    warm: bool
    variables: Mapping[str, str]
    folder: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What happened since the last report.

    Attributes:
        events: The worker's.
        log: What it printed.
        exit_code: The job's, once it has ended; then nothing follows.
    """

    events: list[Event]
    log: bytes
    exit_code: int | None


class Host:
    """One place for a job. Its methods are called from several threads, `poll` from one."""

    def __init__(self) -> None:
        self._logs = pathlib.Path(tempfile.mkdtemp(prefix="runner-host-"))
        self._log, self._read, self._jobs = self._logs / "0.txt", 0, 0
        self._worker: WarmWorker | None = None
        self._process: Process | None = None

    def name(self) -> str:
        """The machine's name."""
        return platform.node()

    def begin(self, task: Task) -> tuple[int, str, str] | None:
        """Start a job; exit code, reason and fault if it cannot be."""
        self._log.unlink(missing_ok=True)
        self._jobs += 1
        self._log, self._read = self._logs / f"{self._jobs}.txt", 0
        self._log.touch()
        try:
            self._process = self._start(task)
        except RunnerError as error:
            return int(error.exit_code), f"{self.name()}: {error}", error.fault.value
        return None

    def poll(self, seconds: float) -> Report:
        """What happened; waits for something to happen, but not longer than this."""
        process = self._process
        assert process is not None, "there is a job"
        code, events = process.exit_code(), list(process.events())
        if code is None and not events:
            process.wait(seconds)
            code, events = process.exit_code(), list(process.events())
        with open(self._log, "rb") as file:
            file.seek(self._read)
            log = file.read()
        self._read += len(log)
        return Report(events, log, code)

    def signal(self, number: int) -> None:
        """Send a signal to the worker."""
        if self._process is not None:
            self._process.signal(signal.Signals(number))

    def kill(self) -> None:
        """End the job, if it still runs."""
        if self._process is not None:
            self._process.kill()

    def finish(self) -> None:
        """The job has ended: let go of its worker, or keep it warm."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.close()

    def _start(self, task: Task) -> Process:
        check_shared(str(task.request["checkpoints"]), among="machines of the cluster")
        with contextlib.suppress(OSError):  # not there on a machine that shares checkpoints alone
            os.chdir(task.folder)
        config = config_from_json(task.request["config"])
        environment = {**task.variables, **environment_of(config)}
        if not task.warm:
            return start_child(task.request, environment, self._log)
        if self._worker is None:
            self._worker = WarmWorker(Standby())
        return self._worker.lend(task.request, environment, self._log, key=task.key)


def _spans_hosts(config: Config) -> bool:
    """Whether a job takes a whole slice of several hosts, and not some chips of one of them."""
    named = SLICES.get(config.hardware.name)
    some = config.batch.chips_per_job or config.hardware.devices
    return named is not None and named.hosts > 1 and some is None


def environment_of(config: Config) -> dict[str, str]:
    """Variables of the device; the chips are those that Ray gave to this process."""
    hardware = find_hardware(config.hardware)
    host = hosts.this_host(config) if _spans_hosts(config) else hosts.Host()
    environment = hardware.environment() | host.environment()
    if hardware.kind == "tpu" and os.environ.get(_VISIBLE):
        environment |= chip_environment(os.environ[_VISIBLE])
    return environment
