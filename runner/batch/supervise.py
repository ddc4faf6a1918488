"""One run from start to result: its attempts, and what becomes of it.

The parent never imports torch and never dies with a job: whatever happens to a worker becomes
an outcome with a reason, and what deserves another try gets one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
import traceback
from collections.abc import Iterator

from runner.batch.attempt import AttemptRun
from runner.batch.child import start_child
from runner.batch.environment import describe_environment
from runner.batch.history import check_resumable, earlier_result, evaluated_step
from runner.batch.retries import Budgets, is_deadly
from runner.batch.seat import Seat
from runner.batch.stop import StopSignals
from runner.config.codec import config_to_json
from runner.config.hardware import Hardware, find_hardware
from runner.config.hosts import Host, this_host
from runner.config.schema import Config, Mode, SinksConfig
from runner.observe.console import Console
from runner.observe.follower import FollowerDisplay
from runner.observe.observer import Observer
from runner.record.checkpoints import location, note_location, open_storage
from runner.record.errors import ExitCode, Fault, RunnerError
from runner.record.events import Notice
from runner.record.files import strict_json, write_atomic, write_json
from runner.record.manifest import folder_name
from runner.record.outcome import Attempt, Result, State, state_of
from runner.record.rundir import RunDir

#: What a checkpoint is renamed to that loads and does not survive.
CRASHED = "crashed"
_POLL_S = 0.1


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


def supervise(
    config: Config, run_dir: RunDir, *, plan: RunPlan, seat: Seat | None = None
) -> Result:
    """Run a job in child processes and record what became of it.

    A folder that holds checkpoints is gone on with.

    Args:
        config: What to do.
        run_dir: The run folder.
        plan: What the folder records of how it was asked for.
        seat: Where it takes place, in a batch. Default: alone, at this process's console. On a
            host that is not the first of its job the run folder is left alone.

    Raises:
        BusyError: Another process owns the run folder.
        ConfigError: The folder's checkpoints are of another configuration.
    """
    if seat is None:
        with _alone(config) as seat, _folder(run_dir, seat.host) as folder:
            return supervise(config, folder, plan=plan, seat=seat)
    with run_dir.lock():
        place = location(run_dir, config.checkpoint.root)
        storage = open_storage(place)
        check_resumable(config, run_dir, storage)
        run_dir.create()
        earlier = earlier_result(run_dir, storage)
        observer = Observer(
            run_dir,
            config=config if seat.host.first else dataclasses.replace(config, sinks=SinksConfig()),
            console=seat.display,
            logdir=plan.tensorboard_root,
            earlier=earlier,
        )
        run = _Run(config, run_dir, plan=plan, observer=observer, seat=seat, place=place)
        run.attempts.extend(earlier.attempts if earlier else [])
        result = run.to_the_end()
        observer.finish(result)
    return result


@contextlib.contextmanager
def _alone(config: Config) -> Iterator[Seat]:
    host = this_host(config)
    display = Console() if host.first else FollowerDisplay(host.index, host.count)
    try:
        with StopSignals() as stop:
            yield Seat(display, stop, start_child, host=host)
    finally:
        display.close()


@contextlib.contextmanager
def _folder(run_dir: RunDir, host: Host) -> Iterator[RunDir]:
    """The run folder, which the first host has; another makes do with one that goes away."""
    if host.first:
        yield run_dir
        return
    with tempfile.TemporaryDirectory(prefix=f"runner-host-{host.index}-") as scratch:
        yield RunDir(pathlib.Path(scratch) / "run")


def _write_request(run_dir: RunDir, plan: RunPlan) -> None:
    overrides = "".join(f"{override}\n" for override in plan.overrides)
    write_atomic(run_dir.config, plan.config_yaml, durable=False)
    write_atomic(run_dir.overrides, overrides, durable=False)
    write_json(run_dir.environment, describe_environment(), durable=False)


class _Run:
    """The attempts of one run."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        *,
        plan: RunPlan,
        observer: Observer,
        seat: Seat,
        place: str,
    ) -> None:
        self.attempts: list[Attempt] = []
        self._unwritten: RunPlan | None = plan
        self._config = config
        self._run_dir = run_dir
        self._observer = observer
        self._seat, self._stop = seat, seat.stop
        self._place = place
        self._storage = open_storage(place)

    def to_the_end(self) -> Result:
        """Try until it is done, or nothing is left to try; the result is on disk."""
        saved = self._storage.steps()
        budgets = Budgets(self._config.retries, saved_step=saved[0] if saved else 0)
        while True:
            attempt = self._stop.verdict(self._guarded_attempt())
            self.attempts.append(attempt)
            wait_s = budgets.wait_s(attempt)
            if wait_s is None or (self._stop.asked and attempt.fault is Fault.PREEMPTION):
                return self._record(state_of(attempt.exit_code), attempt)
            self._record(State.RUNNING)
            self._say(
                f"attempt {len(self.attempts)} ended at step {attempt.steps}: {attempt.cause}; "
                f"trying again in {wait_s:g} s ({budgets.left(attempt.fault)} after "
                f"{attempt.fault.value})"
            )
            if not self._wait(wait_s):
                return self._stopped(attempt)
            self._fall_back()

    def _stopped(self, attempt: Attempt) -> Result:
        """The result of a run that was asked to stop when it would have been tried again."""
        terminated = self._stop.terminated
        code = ExitCode.PREEMPTED if terminated else ExitCode.INTERRUPTED
        how = "preempted by SIGTERM" if terminated else "interrupted"
        cause = f"{how} before the next attempt; the last one: {attempt.cause}"
        stopped = dataclasses.replace(attempt, exit_code=int(code), cause=cause)
        last = self._stop.verdict(stopped)
        return self._record(state_of(last.exit_code), last)

    def _guarded_attempt(self) -> Attempt:
        try:
            return self._attempt()
        except RunnerError as error:
            return Attempt(str(error), int(error.exit_code), 0, 0.0, error.fault, first_step=-1)
        except Exception as error:  # a bug of ours: the run must still get its result
            traceback.print_exc()
            cause = f"{type(error).__name__}: {error}"
            return Attempt(cause, int(ExitCode.BUG), 0, 0.0, Fault.FINAL, first_step=-1)
        finally:
            self._write_request()

    def _attempt(self) -> Attempt:
        none_here = self._config.mode is Mode.preflight or self._seat.elsewhere
        hardware = Hardware("cpu", 1) if none_here else self._find_hardware()
        if hardware.notice and not self.attempts:
            self._observer.handle(Notice("info", hardware.notice))
        note_location(self._run_dir, self._place)
        request = {
            "config": config_to_json(self._config),
            "checkpoints": self._place,
            "folder": os.fspath(self._run_dir.path.absolute()),
            "evaluated": evaluated_step(self._run_dir),
        }
        return AttemptRun(
            self._run_dir,
            observer=self._observer,
            seat=self._seat,
            timeouts=self._config.timeouts,
            on_started=self._note_start,
            on_saved=self._note_progress,
        ).run(request, hardware.environment() | self._seat.host.environment())

    def _find_hardware(self) -> Hardware:
        single = self._config.parallel.name == "single"
        return find_hardware(self._config.hardware, single=single)

    def _note_start(self) -> None:
        """Write files while the worker starts up, which takes longer."""
        self._write_request()
        self._record(State.RUNNING)

    def _write_request(self) -> None:
        plan, self._unwritten = self._unwritten, None
        if plan is not None:
            _write_request(self._run_dir, plan)
            self._observer.asked(plan.config_yaml)

    def _note_progress(self) -> None:
        self._record(State.RUNNING)

    def _record(self, state: State, last: Attempt | None = None) -> Result:
        """Write result.json as things stand."""
        outcome = Result(
            job=self._config.job.name,
            backend=self._config.backend.name,
            state=state,
            exit_code=last.exit_code if last else None,
            reason=last.cause if last else "",
            attempts=list(self.attempts),
        )
        result = self._observer.fill(outcome)
        try:
            plain = strict_json(result.to_json())
            write_json(self._run_dir.result, plain, durable=state.ended)
        except OSError as error:  # a full disk ends no run; its state is in the checkpoints
            self._say(f"cannot write {self._run_dir.result}: {error}")
        return result

    def _wait(self, seconds: float) -> bool:
        """Wait before the next attempt; False if a stop is asked for meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._stop.asked:
            time.sleep(_POLL_S)
        return not self._stop.asked

    def _fall_back(self) -> None:
        """Set the newest checkpoint aside if it is to blame and there is one before it."""
        steps = self._storage.steps()
        if len(steps) < 2 or not is_deadly(self.attempts, step=steps[0]):
            return
        new = self._storage.set_aside(folder_name(steps[0]), CRASHED)
        self._say(
            f"the checkpoint of step {steps[0]} was loaded twice and the job died twice: it is "
            f"now {new}, and the one of step {steps[1]} is used"
        )

    def _say(self, message: str) -> None:
        self._observer.handle(Notice("warning", message))
