"""The child's entry: one job from its configuration to its last event.

`python -m runner.worker EVENTS_FD PARENT_PID` reads a request, one line of JSON, from
standard input; the environment of the device was set by the parent. Everything that the
parent should know leaves as events; what is printed goes to the run's log.
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

from runner.config.codec import config_from_json
from runner.config.hardware import find_hardware
from runner.config.schema import Config, Mode
from runner.record.checkpoints import open_storage
from runner.record.errors import ExitCode, RunnerError
from runner.record.events import (
    Compiled,
    Ended,
    Event,
    GraphRecord,
    Notice,
    Phase,
    Planned,
    Started,
)
from runner.record.pipe import EventWriter
from runner.record.signals import SHOW_STACKS
from runner.record.storage import Storage
from runner.train.explain import explain
from runner.train.signals import StopFlag, die_with_parent

if TYPE_CHECKING:
    from runner.backends.base import Backend
    from runner.train.build import Built
    from runner.train.saver import Saver

_VERSIONS_OF = ("torch", "torch_xla", "torchvision", "numpy")


@dataclasses.dataclass
class Worker:
    """Runs one job, sending events."""

    config: Config
    storage: Storage
    send: Callable[[Event], None]
    stop: StopFlag
    folder: pathlib.Path
    step: int = 0
    state_bytes: int = 0

    def run(self) -> None:
        """Build the job, open its backend, train or evaluate.

        Raises:
            RunnerError: Anything with a known cause.
        """
        if self.config.mode is Mode.preflight:
            self._preflight()
            return
        # torch is imported here and not above, so that a bad request fails first.
        from runner.backends import registry
        from runner.train.build import build
        from runner.train.loop import Training
        from runner.train.resume import restore

        self.send(Phase("building"))
        built = build(self.config)
        saver = self._saver(built)
        backend = registry.build(
            self.config.backend.name,
            built.recipe,
            on_start=lambda role: self.send(Phase("compiling", role)),
            on_record=self._on_record,
            strict=self.config.strict,
            steps_per_call=self.config.backend.steps_per_call,
        )
        self.state_bytes = backend.state(0).bytes()
        self.step = restore(backend, self.config, own=self.storage, warn=self._warn)
        saver.begin(self.step)
        self.send(
            Started(
                pid=os.getpid(),
                device=str(backend.device),
                devices=1,
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
            step=self.step,
        )
        try:
            with saver:
                if self.config.mode is Mode.evaluate:
                    training.evaluate()
                else:
                    training.train()
        finally:
            self.step = training.step

    def _saver(self, built: Built) -> Saver:
        from runner.backends.state import state_dict_names
        from runner.train.checkpoint import Label
        from runner.train.saver import Saver

        config = self.config
        facts = {"job": config.job.name, "backend": config.backend.name, **_versions()}
        label = Label(state_dict_names(built.recipe.model), facts)
        return Saver(self.storage, config.checkpoint, label=label, send=self.send)

    def _warn(self, message: str) -> None:
        self.send(Notice("warning", message))

    def _preflight(self) -> None:
        from runner.preflight.run import Described, Preflight
        from runner.train.build import describe, described_batch

        def described(config: Config) -> Described:
            built = describe(config)
            batch = described_batch(built, config.job.batch_size)
            return Described(built.recipe, batch, built.job.tokens_per_example())

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
        if record.recompile:
            spent = record.trace_s + record.xla_s
            self.send(
                Notice(
                    "warning",
                    f"recompiled the {record.role} graph at step {record.step} "
                    f"({spent:.1f} s): {record.cause}",
                )
            )


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONS_OF}


def main(arguments: list[str]) -> int:
    """Run the request on standard input and return the exit code."""
    events_fd, parent = (int(argument) for argument in arguments)
    die_with_parent(parent)
    faulthandler.enable()
    faulthandler.register(SHOW_STACKS, all_threads=True)
    stop = StopFlag()
    stop.install()
    writer = EventWriter(events_fd)
    request: Mapping[str, Any] = json.loads(sys.stdin.readline())
    worker = Worker(
        config_from_json(request["config"]),
        open_storage(request["checkpoints"]),
        writer.send,
        stop,
        pathlib.Path(request["folder"]),
    )
    ended = _guarded(worker)
    writer.send(ended)
    return ended.exit_code


def _guarded(worker: Worker) -> Ended:
    """Run to the end, whatever that is."""
    try:
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
