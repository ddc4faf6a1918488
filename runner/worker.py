"""The child's entry: a job, or one after another, from its configuration to its last event.

`python -m runner.worker EVENTS_FD PARENT_PID ANSWERS_FD` reads requests, a line of JSON each,
from standard input; the environment of the device was set by the parent. A job that fails ends the
process. Everything that the parent should know leaves as events; what is printed goes to the
run's log.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib.metadata
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from runner.config.changes import differences
from runner.config.codec import config_from_json, config_to_json
from runner.config.hardware import find_hardware
from runner.config.hosts import Host
from runner.config.parallel import Mesh, check_division, mesh_of
from runner.config.schema import Config, Mode
from runner.record.checkpoints import check_shared, open_storage, share
from runner.record.errors import ConfigError, DeviceError, ExitCode, RunnerError
from runner.record.events import (
    Compiled,
    Ended,
    Event,
    GraphRecord,
    Notice,
    Phase,
    Planned,
    Preflighted,
    Started,
)
from runner.record.pipe import AHEAD, EventWriter
from runner.record.rundir import RunDir
from runner.record.signals import SHOW_STACKS
from runner.train.explain import explain
from runner.train.signals import StopFlag, die_with_parent

if TYPE_CHECKING:
    from runner.backends.base import Backend
    from runner.backends.sharding import Sharding
    from runner.train.build import Built
    from runner.train.hosts import Hosts
    from runner.train.input import Share
    from runner.train.loop import Training
    from runner.train.saver import Saver

#: Recompiles of a run that are warned of one by one.
_WARNED = 10
_VERSIONS_OF = ("torch", "torch_xla", "torchvision", "numpy")


@dataclasses.dataclass
class Worker:
    """Runs one job, sending events.

    Attributes:
        config: What to do.
        place: Where its checkpoints are.
        send: Where events go.
        stop: Whether to stop early.
        folder: The run's folder.
        evaluated: The step of the newest evaluation that is recorded.
        compiled: What XLA had compiled in this process before the job, and at its end: a
            count and seconds.
        step: Completed updates.
        hosts: Those that run the job together, once they have met.
        training: The run, once it goes.
        state_bytes: Bytes of the state.
        recompiles: Graphs that were compiled again after warm-up.
    """

    config: Config
    place: str
    send: Callable[[Event], None]
    stop: StopFlag
    folder: pathlib.Path
    evaluated: int = 0
    compiled: tuple[int, float] = (0, 0.0)
    step: int = 0
    hosts: Hosts | None = None
    training: Training | None = None
    state_bytes: int = 0
    recompiles: int = 0

    def run(self) -> None:
        """Build the job, open its backend, train or evaluate.

        Raises:
            RunnerError: Anything with a known cause.
        """
        if self.config.mode is Mode.preflight:
            self._preflight()
            return
        self._train(self._meet())

    def _train(self, hosts: Hosts) -> None:
        from runner.backends import registry
        from runner.train.build import build
        from runner.train.loop import Training
        from runner.train.profiler import Profiler
        from runner.train.resume import restore

        self.send(Phase("building"))
        built = build(self.config)
        saver = self._saver(built, hosts)
        sharding = self._sharding(built, hosts)
        backend = registry.build(
            self.config.backend.name,
            built.recipe,
            on_start=lambda role: self.send(Phase("compiling", role)),
            on_record=self._on_record,
            strict=self.config.strict,
            steps_per_call=self.config.backend.steps_per_call,
            labelled=self.config.profile.steps is not None,
            sharding=sharding,
        )
        self.state_bytes = backend.state(0).bytes()
        self.step = restore(
            backend, self.config, own=open_storage(self.place), warn=self._warn, hosts=hosts
        )
        saver.begin(self.step)
        self.send(
            Started(
                pid=os.getpid(),
                device=str(backend.device),
                devices=sharding.mesh.devices,
                versions=_versions(),
                first_step=self.step,
            )
        )
        self.send(self._planned(built, backend))
        training = Training(
            self.config,
            built,
            backend,
            send=self.send,
            stop=self.stop,
            saver=saver,
            profiler=Profiler(
                self.config.profile.steps if hosts.first else None,
                folder=RunDir(self.folder).tensorboard,
                send=self.send,
            ),
            step=self.step,
            evaluated=self.evaluated,
            compiled_before=self.compiled,
            hosts=hosts,
            share=_share(sharding.mesh, hosts),
        )
        self.training = training
        try:
            with saver:
                if self.config.mode is Mode.evaluate:
                    training.evaluate()
                else:
                    training.train()
        finally:
            self.step = training.step
            self.compiled = backend.compile_totals()

    def _meet(self) -> Hosts:
        """The hosts that run this job by the same command; where things are, the first says.

        Raises:
            ConfigError: They were started with different configurations.
            DeviceBusyError: Some have not come.
        """
        from runner.train.hosts import join

        self.hosts = hosts = join(
            Host.told() or Host(),
            timeout_s=self.config.timeouts.hosts_s,
            waiting=lambda whom: self.send(Phase("waiting", f"for {whom}")),
            on_lost=self._lost,
        )
        said = {
            "config": config_to_json(self.config),
            "checkpoints": self.place,
            "evaluated": self.evaluated,
        }
        saves = self.config.checkpoint.enabled and hosts.count > 1
        if saves and hosts.first:
            share(self.place)
        first = hosts.settle("start", said, _alike)
        self.place, self.evaluated = first["checkpoints"], first["evaluated"]
        if saves:
            check_shared(self.place, among="hosts of the job")
        return hosts

    def _lost(self, ended: Ended) -> None:
        """Another host has ended, and this one waits in a collective for ever, or soon will."""
        self.send(
            dataclasses.replace(ended, step=self.training.step if self.training else self.step)
        )
        os._exit(ended.exit_code)

    def _sharding(self, built: Built, hosts: Hosts) -> Sharding:
        """What lies how on which devices.

        Raises:
            ConfigError: A size of the job does not divide over the devices that there are.
        """
        from runner.backends.sharding import ONE_DEVICE, Sharding
        from runner.xla.mesh import device_count, process_count

        config = self.config
        if config.parallel.name == "single":
            return ONE_DEVICE
        devices = device_count()
        if process_count() != hosts.count:
            raise DeviceError(
                f"the devices of {process_count()} hosts can be seen, and the job has {hosts.count}"
            )
        check_division(config, devices)
        if devices == 1:
            self._warn(
                f"parallel={config.parallel.name} has one device, which is the same as "
                "parallel=single; on the CPU hardware.devices says how many there are"
            )
        return Sharding(mesh_of(config.parallel, devices), built.job.sharding)

    def _saver(self, built: Built, hosts: Hosts) -> Saver:
        from runner.backends.state import state_dict_names
        from runner.train.checkpoint import Label
        from runner.train.saver import Saver

        config = self.config
        facts = {"job": config.job.name, "backend": config.backend.name, **_versions()}
        label = Label(state_dict_names(built.recipe.model), facts)
        return Saver(
            open_storage(self.place), config.checkpoint, label=label, send=self.send, hosts=hosts
        )

    def _warn(self, message: str) -> None:
        self.send(Notice("warning", message))

    def recall(self) -> bool:
        """Whether a preflight's verdict is known already; it is sent then."""
        if self.config.mode is not Mode.preflight:
            return False
        from runner.preflight.recall import recalled

        report = recalled(self.config)
        if report is not None:
            self.send(Preflighted(report.to_json()))
        return report is not None

    def _preflight(self) -> None:
        from runner.preflight.run import Described, Preflight
        from runner.train.build import describe, described_batch

        def described(config: Config) -> Described:
            built = describe(config)
            batch = described_batch(built, config.job.batch_size)
            tokens = built.job.tokens_per_example()
            return Described(built.recipe, batch, tokens, built.job.sharding)

        Preflight(described, self.send, self.folder).run(self.config)

    def _planned(self, built: Built, backend: Backend) -> Planned:
        from runner.train.build import example_batch
        from runner.train.flops import flops_per_step

        config = self.config
        flops, peak = None, config.hardware.peak_flops_per_s
        if peak is None and backend.device.type == "xla":
            peak = find_hardware(config.hardware).peak_flops_per_s
        if peak is not None:
            # After the device is open: autograd knows no device that comes after its first use.
            flops = flops_per_step(built.recipe, example_batch(built, config))
        return Planned(
            steps=config.steps if config.mode is Mode.train else 0,
            parameters=sum(param.numel() for param in built.recipe.model.parameters()),
            state_bytes=self.state_bytes,
            train_examples=len(built.data.train),
            eval_examples=len(built.data.heldout or ()),
            flops_per_step=flops,
            peak_flops_per_s=peak,
        )

    def _on_record(self, record: GraphRecord) -> None:
        self.send(Compiled(record))
        if not record.recompile:
            return
        self.recompiles += 1
        if self.recompiles <= _WARNED:
            spent = record.trace_s + record.xla_s
            self._warn(
                f"recompiled the {record.role} graph at step {record.step} "
                f"({spent:.1f} s): {record.cause}"
            )
        if self.recompiles == _WARNED:
            self._warn(
                f"{_WARNED} recompiles so far; no warning follows for further ones, which "
                "compile/recompiles counts (strict=true ends a run at the first)"
            )


def _alike(words: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first host says of the run, if all do the same job."""
    first, *others = (config_from_json(word["config"]) for word in words)
    for index, other in enumerate(others, start=1):
        changed = differences(first, other)
        if changed:
            lines = "".join(f"\n  {key}: {a!r} -> {b!r}" for key, (a, b) in changed.items())
            raise ConfigError(
                f"every host of a job must be started by the same command; host {index} has "
                f"another configuration than host 0:{lines}"
            )
    return words[0]


def _share(mesh: Mesh, hosts: Hosts) -> Share:
    """What this host reads of every batch."""
    from runner.train.input import Share
    from runner.xla.mesh import own_devices

    if hosts.count == 1:
        return Share()
    return Share(mesh.batch_parts_on(own_devices()), of=mesh.batch_parts)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONS_OF}


def main(arguments: list[str]) -> int:
    """Run the request on standard input and return the exit code."""
    events_fd, parent, answers_fd = (int(argument) for argument in arguments[:3])
    die_with_parent(parent)
    faulthandler.enable()
    faulthandler.register(SHOW_STACKS, all_threads=True)
    stop = StopFlag()
    stop.install()
    writer = EventWriter(events_fd, answers_fd)
    compiled = (0, 0.0)
    if AHEAD in arguments:
        importlib.import_module("torch_xla")
    for line in sys.stdin:
        request: Mapping[str, Any] = json.loads(line)
        _move(request)
        config = config_from_json(request["config"])
        folder = pathlib.Path(request["folder"])
        evaluated = request["evaluated"]
        place = request["checkpoints"]
        worker = Worker(config, place, writer.send, stop, folder, evaluated, compiled)
        ended = _guarded(worker)
        if worker.hosts is not None:
            worker.hosts.leave(ended)
        compiled = worker.compiled
        sys.stdout.flush()
        writer.send(ended)
        if ended.exit_code and worker.hosts is not None and worker.hosts.count > 1:
            os._exit(ended.exit_code)  # a thread that still listens to others would abort it
        if ended.exit_code:
            return ended.exit_code
    return int(ExitCode.DONE)


def _move(request: Mapping[str, Any]) -> None:
    """Go where the request says: to these cores, and with all that is printed to this file."""
    if request.get("cores"):
        os.sched_setaffinity(0, request["cores"])
    if request.get("log"):
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)


def _guarded(worker: Worker) -> Ended:
    """Run to the end, whatever that is."""
    try:
        if worker.recall():
            return Ended(int(ExitCode.DONE), "", worker.step)
        # torch is imported here and not above, so that a bad request fails first.
        from runner.train.contain import contained

        with contained():
            worker.run()
    except RunnerError as error:
        return Ended(int(error.exit_code), str(error), worker.step, error.fault.value)
    except Exception as error:
        traceback.print_exc()
        exit_code, reason, fault = explain(error, state_bytes=worker.state_bytes)
        return Ended(int(exit_code), reason, worker.step, fault.value)
    return Ended(int(ExitCode.DONE), "", worker.step)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
