"""What the runner's loop costs a step, beside a bare script that makes the same compiled calls.

Both take the same backend object, the same batches and the same learning rates, in one
process, in turns; the events of the runner's loop go to a parent process that writes
TensorBoard and metrics.jsonl as in a real run. Reported: median seconds a step of each, over
rounds, and their ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from runner.cli.app import conf_folder
from runner.config.compose import Composer
from runner.config.hardware import find_hardware
from runner.config.schema import Config
from runner.config.trust import trusted_packages
from runner.record.storage import LocalStorage

TARGET = 1.02

PARENT = """
import os, pathlib, sys
from runner.config.codec import config_from_json
from runner.observe.console import Console
from runner.observe.observer import Observer
from runner.record.pipe import EventReader
from runner.record.rundir import RunDir
import json, select
run_dir = RunDir(pathlib.Path(sys.argv[1]))
run_dir.create()
config = config_from_json(json.loads(sys.argv[2]))
observer = Observer(run_dir, config=config, console=Console())
os.set_blocking(0, False)
reader = EventReader(0)
while not reader.closed:
    select.select([0], [], [])
    for event in reader.read():
        observer.handle(event)
"""


class Remembered:
    """A data source that prepares each batch once, so that both loops find it ready."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._batches: dict[bytes, Any] = {}

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: Any, *, rng: np.random.Generator | None) -> Any:
        key = indices.tobytes()
        if key not in self._batches:
            self._batches[key] = self._source.batch(indices, rng=rng)
        return self._batches[key]


def main() -> int:
    """Run the comparison and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="bench overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="steps a round")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", help="as for the runner")
    arguments = parser.parse_args()
    composer = Composer(conf_folder(), extra=None, trusted=trusted_packages())
    config = composer.config(arguments.overrides or ["job=mlp"])
    os.environ.update(find_hardware(config.hardware).environment())
    figures = measure(config, rounds=arguments.rounds, steps=arguments.steps)
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        print(f"job={config.job.name} backend={config.backend.name}")
        print(f"bare loop     {figures['bare_ms']:9.3f} ms a step")
        print(f"runner's loop {figures['runner_ms']:9.3f} ms a step")
        print(f"ratio         {figures['ratio']:9.4f}    (target: at most {TARGET})")
    return 0 if figures["ratio"] <= TARGET else 1


def measure(config: Config, *, rounds: int, steps: int) -> dict[str, float]:
    """Median milliseconds a step of both loops, and their ratio."""
    from runner.backends import registry
    from runner.record.pipe import EventWriter
    from runner.train.build import build
    from runner.train.checkpoint import Label
    from runner.train.input import read
    from runner.train.loop import Training
    from runner.train.order import BatchOrder
    from runner.train.profiler import Profiler
    from runner.train.saver import Saver
    from runner.train.signals import StopFlag

    built = build(config)
    source = Remembered(built.data.train)
    data = dataclasses.replace(built.data, train=source, heldout=None)
    built = dataclasses.replace(built, data=data)
    backend = registry.build(
        config.backend.name,
        built.recipe,
        on_start=lambda role: None,
        on_record=lambda record: None,
        strict=False,
    )
    order = BatchOrder(len(source), config.job.batch_size, config.seed)
    batches = [read(source, order.indices(step), rng=order.rng(step)) for step in range(steps)]

    def bare() -> float:
        start = time.perf_counter()
        for step, batch in enumerate(batches):
            metrics = backend.train_step(backend.place(batch), step=step, lr=config.optim.lr)
        metrics["loss"].item()
        return (time.perf_counter() - start) / steps

    with tempfile.TemporaryDirectory() as folder:
        parent = _start_parent(config, folder)
        assert parent.stdin is not None
        writer = EventWriter(parent.stdin.fileno())
        checkpoint = dataclasses.replace(config.checkpoint, enabled=False)
        short = dataclasses.replace(config, steps=steps, eval_every=0, checkpoint=checkpoint)
        storage, label = LocalStorage(pathlib.Path(folder)), Label({}, {})
        saver = Saver(storage, checkpoint, label=label, send=writer.send)

        def looped() -> float:
            training = Training(
                short,
                built,
                backend,
                send=writer.send,
                stop=StopFlag(),
                saver=saver,
                profiler=Profiler(None, folder=pathlib.Path(folder), send=writer.send),
            )
            start = time.perf_counter()
            training.train()
            return (time.perf_counter() - start) / steps

        bare(), looped()
        pairs = [(bare(), looped()) for _ in range(rounds)]
        parent.stdin.close()
        parent.wait(timeout=60)
    bare_ms, runner_ms = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    return {"bare_ms": bare_ms, "runner_ms": runner_ms, "ratio": runner_ms / bare_ms}


def _start_parent(config: Config, folder: str) -> subprocess.Popen[bytes]:
    from runner.config.codec import config_to_json

    return subprocess.Popen(
        [sys.executable, "-c", PARENT, folder, json.dumps(config_to_json(config))],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    sys.exit(main())
