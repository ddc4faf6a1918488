"""One worker from start to end: what it says, what is asked of it, what kills it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from runner.batch.environment import describe_environment
from runner.batch.logtail import LogTail
from runner.batch.seat import Process, Seat
from runner.batch.watchdog import Watchdog
from runner.config.schema import TimeoutsConfig
from runner.observe.observer import Observer
from runner.record.errors import ExitCode, Fault
from runner.record.events import CheckpointSaved, Ended, Event, Notice, Started, Steps
from runner.record.files import write_json
from runner.record.outcome import Attempt
from runner.record.rundir import RunDir
from runner.record.signals import SHOW_STACKS

#: Seconds that a worker has to write its stacks before it is ended.
_STACKS_S = 3.0
#: Seconds that a worker has to leave after its last word.
_LEAVE_S = 30.0

_VMSTAT = pathlib.Path("/proc/vmstat")

Outcome = tuple[ExitCode | int, str, Fault]


class AttemptRun:
    """Runs a worker once.

    Args:
        run_dir: The run's folder.
        observer: Takes the worker's events.
        seat: What stops the run, and what starts its worker.
        timeouts: What the worker may take.
        on_started: Called when the worker has been started, and not yet listened to.
        on_saved: Called when a checkpoint is complete.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        observer: Observer,
        seat: Seat,
        timeouts: TimeoutsConfig,
        on_started: Callable[[], None],
        on_saved: Callable[[], None],
    ) -> None:
        self._run_dir = run_dir
        self._observer = observer
        self._stop, self._start = seat.stop, seat.start
        self._timeouts = timeouts
        self._on_started, self._on_saved = on_started, on_saved
        self._watchdog = Watchdog(timeouts)
        self._started: Started | None = None
        self._ended: Ended | None = None
        self._ended_s = self._terminated_s = 0.0
        self._saved_step = self._rss_bytes = self._forwarded = 0
        self._killed: Outcome | None = None

    def run(self, request: Mapping[str, Any], environment: Mapping[str, str]) -> Attempt:
        """Start the worker with this request and see it through."""
        start, ooms = time.monotonic(), _oom_kills()
        child = self._start(request, environment, self._run_dir.log)
        try:
            self._on_started()
            self._follow(child)
        finally:
            child.kill()
            child.close()
        code = child.exit_code()
        assert code is not None
        exit_code, cause, fault = self._outcome(code, starved=_oom_kills() > ooms)
        return self._attempt(int(exit_code), cause, fault, seconds=time.monotonic() - start)

    def _attempt(self, exit_code: int, cause: str, fault: Fault, *, seconds: float) -> Attempt:
        first = self._started.first_step if self._started else 0
        steps = self._ended.step if self._ended else self._observer.steps
        held = max(self._saved_step, first)
        return Attempt(
            cause=cause,
            exit_code=exit_code,
            steps=steps,
            seconds=round(seconds, 3),
            fault=fault,
            # An attempt that ended before its state was loaded says nothing of a checkpoint.
            first_step=first if self._started else -1,
            saved_step=self._saved_step,
            lost_steps=max(0, steps - held) if exit_code and self._started else 0,
        )

    def _follow(self, child: Process) -> None:
        """Pass on what the worker says until it has ended."""
        log = LogTail(self._run_dir.log)
        while True:
            running = child.exit_code() is None
            for event in child.events():
                self._take(event)
                self._forward(child)  # here too: events may come faster than they are taken
            for line in log.lines(final=not running):
                self._observer.echo(line)
            if not running:
                return
            self._forward(child)
            if not self._run_dir.log.exists():
                self._killed = _removed(self._run_dir)
                child.kill()
            self._end_if_due(child)
            child.wait()

    def _take(self, event: Event) -> None:
        self._watchdog.see(event)
        if isinstance(event, Started):
            self._started = event
            with contextlib.suppress(OSError):  # a full disk ends no run
                _add_device(self._run_dir, event)
        elif isinstance(event, Ended):
            self._ended, self._ended_s = event, time.monotonic()
        elif isinstance(event, Steps):
            self._rss_bytes = event.host_rss_bytes
        self._observer.handle(event)
        if isinstance(event, CheckpointSaved):
            self._saved_step = event.step
            self._on_saved()

    def _forward(self, child: Process) -> None:
        """Pass new signals on: the first asks the worker to stop, the second ends it."""
        stop = self._stop
        asked = stop.interrupts + int(stop.terminated)
        if asked > self._forwarded == 0:
            child.signal(signal.SIGTERM if stop.terminated else signal.SIGINT)
            self._terminated_s = time.monotonic()
            how = "SIGTERM: " if stop.terminated else ""
            message = f"{how}stopping after this step or compile; Ctrl-C again stops now"
            self._observer.handle(Notice("info", message))
        elif asked > self._forwarded:
            self._killed = _interrupted()
            child.kill()
        self._forwarded = asked

    def _end_if_due(self, child: Process) -> None:
        """End a worker that is hung, or that has had its time to stop."""
        if self._killed is not None:
            return
        if self._ended is not None:
            if time.monotonic() - self._ended_s > _LEAVE_S:
                child.kill()
            return
        grace_s = self._timeouts.grace_s
        # The signal may have come after `_forward` looked: its time begins when it is passed on.
        told = self._forwarded and self._stop.terminated
        if told and time.monotonic() - self._terminated_s > grace_s:
            cause = f"preempted by SIGTERM; the worker was still {self._watchdog.phase} after "
            cause += f"{grace_s:g} s (timeouts.grace_s) and was ended without saving"
            self._killed = (ExitCode.PREEMPTED, cause, Fault.PREEMPTION)
            child.kill()
            return
        overdue = self._watchdog.overdue()
        if overdue is not None:
            self._show_stacks(child)
            cause = f"hang: {overdue}; the stacks of its threads are in {self._run_dir.log}"
            self._killed = (ExitCode.HANG, cause, Fault.FAILURE)
            child.kill()

    def _show_stacks(self, child: Process) -> None:
        """Have the worker write its threads' stacks to its log."""
        before = self._run_dir.log.stat().st_size
        child.signal(SHOW_STACKS)
        deadline = time.monotonic() + _STACKS_S
        size, last = before, -1
        while time.monotonic() < deadline and (size == before or size != last):
            time.sleep(0.1)
            last, size = size, self._run_dir.log.stat().st_size

    def _outcome(self, code: int, *, starved: bool) -> Outcome:
        """Exit code, cause and fault of a worker that has ended."""
        ended, stop = self._ended, self._stop
        if ended is not None:
            return ended.exit_code, ended.reason, Fault(ended.fault)
        if self._killed is not None:
            return self._killed
        if stop.interrupts:
            return _interrupted()
        if stop.terminated:
            return ExitCode.PREEMPTED, "preempted by SIGTERM before it could save", Fault.PREEMPTION
        if code == -signal.SIGKILL and starved:
            return ExitCode.DEVICE, self._starved(), Fault.HOST_MEMORY
        if code == -signal.SIGTERM:
            return ExitCode.PREEMPTED, "preempted by SIGTERM while starting", Fault.PREEMPTION
        if code < 0:
            return ExitCode.BUG, f"the worker was killed by {_name(-code)}", Fault.FAILURE
        cause = f"the worker ended with exit code {code} without a word; see {self._run_dir.log}"
        return ExitCode.BUG, cause, Fault.FAILURE

    def _starved(self) -> str:
        total = psutil.virtual_memory().total
        return (
            "out of host memory: the kernel killed the worker, which last held "
            f"{self._rss_bytes / 1e9:.2f} GB of the machine's {total / 1e9:.2f} GB"
        )


def _removed(run_dir: RunDir) -> Outcome:
    cause = f"the run folder {run_dir.path} was removed while the run was going on"
    return ExitCode.CHECKPOINT, f"{cause}, and with it what was saved", Fault.FINAL


def _interrupted() -> Outcome:
    return ExitCode.INTERRUPTED, "interrupted; the worker was ended at once", Fault.FINAL


def _oom_kills() -> int:
    """Processes that the kernel has killed for lack of memory; 0 where it does not tell."""
    try:
        lines = _VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _add_device(run_dir: RunDir, event: Started) -> None:
    described = describe_environment()
    described["device"] = {"name": event.device, "count": event.devices, "pid": event.pid}
    described["versions"].update(event.versions)
    described["variables"] = {k: v for k, v in os.environ.items() if k.startswith("XLA_")}
    write_json(run_dir.environment, described, durable=False)
