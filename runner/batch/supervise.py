"""One run from start to result: the worker, what it says, what kills it.

The parent never imports torch and never dies with a job: whatever happens to the worker
becomes an outcome with a reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator

from runner.batch.child import Child
from runner.batch.environment import describe_environment
from runner.batch.logtail import LogTail
from runner.batch.stop import StopSignals
from runner.config.codec import config_to_json
from runner.config.hardware import find_hardware
from runner.config.schema import Config
from runner.observe.console import Console
from runner.observe.observer import Observer
from runner.record.errors import ExitCode, RunnerError
from runner.record.events import Ended, Notice, Started
from runner.record.files import strict_json, write_atomic, write_json
from runner.record.outcome import Attempt, Result, State, state_of
from runner.record.rundir import RunDir


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run folder records of how it was asked for.

    Attributes:
        overrides: The command line's overrides.
        config_yaml: The configuration as text, secrets left out.
        tensorboard_root: The folder to start TensorBoard on: the run's, or its sweep's.
    """

    overrides: list[str]
    config_yaml: str
    tensorboard_root: pathlib.Path


def supervise(config: Config, run_dir: RunDir, *, plan: RunPlan) -> Result:
    """Run a job in a child process and record what became of it.

    Raises:
        BusyError: Another process owns the run folder.
    """
    with run_dir.lock():
        run_dir.create()
        _write_request(run_dir, plan)
        observer = Observer(run_dir, config=config, console=Console(), logdir=plan.tensorboard_root)
        pending = Result(job=config.job.name, backend=config.backend.name)
        try:
            write_json(run_dir.result, dataclasses.replace(pending, state=State.RUNNING).to_json())
            attempt = _attempt(config, run_dir, observer)
        except RunnerError as error:
            attempt = Attempt(str(error), int(error.exit_code), 0, 0.0)
        except Exception as error:  # a bug of ours: the run must still get its result
            traceback.print_exc()
            attempt = Attempt(f"{type(error).__name__}: {error}", int(ExitCode.BUG), 0, 0.0)
        outcome = dataclasses.replace(
            pending,
            state=state_of(attempt.exit_code),
            exit_code=attempt.exit_code,
            reason=attempt.cause,
            attempts=[attempt],
        )
        result = observer.fill(outcome)
        write_json(run_dir.result, strict_json(result.to_json()))
        observer.finish(result)
        if result.reason:
            print(f"runner: {result.reason}", file=sys.stderr)
    return result


def _write_request(run_dir: RunDir, plan: RunPlan) -> None:
    write_atomic(run_dir.config, plan.config_yaml)
    write_atomic(run_dir.overrides, "".join(f"{override}\n" for override in plan.overrides))
    write_json(run_dir.environment, describe_environment())


def _attempt(config: Config, run_dir: RunDir, observer: Observer) -> Attempt:
    """One worker, from start to end."""
    hardware = find_hardware(config.hardware)
    if hardware.notice:
        observer.handle(Notice("info", hardware.notice))
    start = time.monotonic()
    with StopSignals() as stop, _child(config, run_dir, hardware.environment()) as child:
        ended = _follow(child, run_dir, observer=observer, stop=stop)
        exit_code, cause = _outcome(child, ended, stop)
    steps = ended.step if ended is not None else observer.steps
    return Attempt(cause, exit_code, steps, round(time.monotonic() - start, 3))


@contextlib.contextmanager
def _child(config: Config, run_dir: RunDir, environment: dict[str, str]) -> Iterator[Child]:
    child = Child({"config": config_to_json(config)}, environment=environment, log=run_dir.log)
    try:
        yield child
    finally:
        child.kill()
        child.close()


def _follow(
    child: Child, run_dir: RunDir, *, observer: Observer, stop: StopSignals
) -> Ended | None:
    """Pass on what the worker says until it has ended; its last word, if it had one."""
    log = LogTail(run_dir.log)
    last_word = None
    forwarded = 0
    while True:
        running = child.exit_code() is None
        for event in child.events():
            if isinstance(event, Started):
                _add_device(run_dir, event)
            if isinstance(event, Ended):
                last_word = event
            observer.handle(event)
        for line in log.lines(final=not running):
            observer.echo(line)
        if not running:
            return last_word
        forwarded = _forward(child, observer, stop=stop, forwarded=forwarded)
        child.wait()


def _forward(child: Child, observer: Observer, *, stop: StopSignals, forwarded: int) -> int:
    """Pass new signals on to the worker: the first asks it to stop, the second ends it."""
    asked = stop.interrupts + int(stop.terminated)
    if asked > forwarded == 0:
        child.signal(signal.SIGTERM if stop.terminated else signal.SIGINT)
        how = "SIGTERM: " if stop.terminated else ""
        observer.handle(
            Notice("info", f"{how}stopping after this step or compile; Ctrl-C again stops now")
        )
    elif asked > forwarded:
        child.kill()
    return asked


def _outcome(child: Child, ended: Ended | None, stop: StopSignals) -> tuple[int, str]:
    """Exit code and reason of a worker that has ended."""
    code = child.exit_code()
    assert code is not None
    if ended is not None and code in (ended.exit_code, 0):
        return ended.exit_code, ended.reason
    if stop.interrupts and (ended is None or code < 0):
        return int(ExitCode.INTERRUPTED), "interrupted; the worker was ended at once"
    if code < 0:
        return int(ExitCode.BUG), f"the worker was killed by {_signal_name(-code)}"
    return int(ExitCode.BUG), f"the worker ended with exit code {code} without a word; see log.txt"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _add_device(run_dir: RunDir, event: Started) -> None:
    described = describe_environment()
    described["device"] = {"name": event.device, "count": event.devices, "pid": event.pid}
    described["versions"].update(event.versions)
    described["variables"] = {k: v for k, v in os.environ.items() if k.startswith("XLA_")}
    write_json(run_dir.environment, described)
