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
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from runner.config.codec import config_from_json
from runner.config.schema import Config, Mode
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
from runner.train.signals import StopFlag, die_with_parent

if TYPE_CHECKING:
    from runner.backends.base import Backend
    from runner.train.build import Built

_VERSIONS_OF = ("torch", "torch_xla", "torchvision", "numpy")


@dataclasses.dataclass
class Worker:
    """Runs one job, sending events."""

    config: Config
    send: Callable[[Event], None]
    stop: StopFlag
    step: int = 0

    def run(self) -> None:
        """Build the job, open its backend, train or evaluate.

        Raises:
            RunnerError: Anything with a known cause.
        """
        # torch is imported here and not above, so that a bad request fails first.
        from runner.backends import registry
        from runner.train.build import build
        from runner.train.loop import Training

        self.send(Phase("building"))
        built = build(self.config)
        backend = registry.build(
            self.config.backend.name,
            built.recipe,
            on_start=lambda role: self.send(Phase("compiling", role)),
            on_record=self._on_record,
            strict=self.config.strict,
            steps_per_call=self.config.backend.steps_per_call,
        )
        self.send(
            Started(
                pid=os.getpid(),
                device=str(backend.device),
                devices=1,
                versions=_versions(),
            )
        )
        self.send(self._planned(built, backend))
        training = Training(self.config, built, backend, send=self.send, stop=self.stop)
        try:
            if self.config.mode is Mode.evaluate:
                training.evaluate()
            else:
                training.train()
        finally:
            self.step = training.step

    def _planned(self, built: Built, backend: Backend) -> Planned:
        from runner.train.build import example_batch
        from runner.train.flops import flops_per_step

        config = self.config
        flops = None
        if config.hardware.peak_flops_per_s is not None:
            # After the device is open: autograd knows no device that comes after its first use.
            flops = flops_per_step(built.recipe, example_batch(built, config))
        return Planned(
            steps=config.steps if config.mode is Mode.train else 0,
            parameters=sum(param.numel() for param in built.recipe.model.parameters()),
            state_bytes=backend.state(0).bytes(),
            train_examples=len(built.data.train),
            eval_examples=len(built.data.heldout or ()),
            flops_per_step=flops,
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
    stop = StopFlag()
    stop.install()
    writer = EventWriter(events_fd)
    request: Mapping[str, Any] = json.loads(sys.stdin.readline())
    worker = Worker(config_from_json(request["config"]), writer.send, stop)
    exit_code, reason = _guarded(worker)
    writer.send(Ended(exit_code, reason, worker.step))
    return exit_code


def _guarded(worker: Worker) -> tuple[int, str]:
    try:
        worker.run()
    except RunnerError as error:
        return int(error.exit_code), str(error)
    except MemoryError as error:
        traceback.print_exc()
        return int(ExitCode.DEVICE), f"out of host memory: {error}"
    except Exception as error:
        traceback.print_exc()
        return int(_code_of(error)), f"{type(error).__name__}: {_first_line(error)}"
    return int(ExitCode.DONE), ""


def _code_of(error: Exception) -> ExitCode:
    return ExitCode.DEVICE if "RESOURCE_EXHAUSTED" in str(error) else ExitCode.BUG


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
