"""Trains a job over one mesh in a process of its own, and writes its figures as JSON.

`python -m spread.child FOLDER ROUNDS STEPS OVERRIDES...`; XLA writes its programs to FOLDER,
where the figures go as well.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from runner.backends import registry
from runner.backends.base import Backend
from runner.backends.sharding import Sharding
from runner.cli.app import conf_folder
from runner.config.compose import Composer
from runner.config.parallel import mesh_of
from runner.config.schema import Config
from runner.config.trust import trusted_packages
from runner.preflight.costs import COLLECTIVES, collectives
from runner.preflight.hlo import Module
from runner.train.build import Built, build
from runner.train.input import read
from runner.train.order import BatchOrder
from spread.row import Collective, Row

#: What a row is called in the folder.
FIGURES = "row.json"
#: Batches that the updates go round.
BATCHES = 4
#: Losses that are written down.
FIRST = 5


def main() -> None:
    """Measure and write."""
    folder, rounds, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    config = Composer(conf_folder(), extra=None, trusted=trusted_packages()).config(sys.argv[4:])
    row = measure(config, rounds=rounds, steps=steps)
    row = dataclasses.replace(row, collectives=sums(program_text(folder)))
    (folder / FIGURES).write_text(json.dumps(dataclasses.asdict(row)), encoding="utf-8")


def measure(config: Config, *, rounds: int, steps: int) -> Row:
    """The figures that the runtime gives."""
    built = build(config)
    devices = config.hardware.devices or 1
    mesh = mesh_of(config.parallel, devices)
    backend = registry.build(
        config.backend.name,
        built.recipe,
        on_start=lambda role: None,
        on_record=lambda record: None,
        strict=False,
        sharding=Sharding(mesh, built.job.sharding),
    )
    updates = _updates(config, built, backend)
    losses = [next(updates)["loss"].item() for _ in range(FIRST)]
    compiles, programs = backend.compile_totals()[0], backend.programs()
    bursts = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(steps):
            metrics = next(updates)
        metrics["loss"].item()
        bursts.append((time.perf_counter() - began) / steps)
    return Row(
        parallel=config.parallel.name,
        devices=devices,
        step_ms=1e3 * statistics.median(bursts),
        programs_per_step=(backend.programs() - programs) / (rounds * steps),
        recompiles=backend.compile_totals()[0] - compiles,
        state_bytes=backend.memory_bytes(),
        losses=losses,
    )


def _updates(config: Config, built: Built, backend: Backend) -> Iterator[Any]:
    """Metrics of one update after the other, from batches that lie on the devices."""
    source = built.data.train
    order = BatchOrder(len(source), config.job.batch_size, config.seed)
    numbers = range(BATCHES)
    host = [read(source, order.indices(number), rng=order.rng(number)) for number in numbers]
    batches = [backend.place(batch) for batch in host]
    step = 0
    while True:
        yield backend.train_step(batches[step % BATCHES], step=step, lr=config.optim.lr)
        step += 1


def program_text(folder: pathlib.Path) -> str:
    """The optimized program of a device: the step's, which is the largest that was compiled."""
    found = folder.glob("*after_optimizations.txt")
    return max(found, key=lambda path: path.stat().st_size).read_text(encoding="utf-8")


def sums(text: str) -> list[Collective]:
    """The collectives of a program, by kind."""
    found = collectives(Module(text))
    return [
        Collective(
            kind=kind,
            count=sum(one.times for one in found if one.kind == kind),
            bytes=sum(one.times * one.bytes for one in found if one.kind == kind),
            wire_bytes=sum(one.times * one.wire_bytes for one in found if one.kind == kind),
        )
        for kind in COLLECTIVES
        if any(one.kind == kind for one in found)
    ]


if __name__ == "__main__":
    main()
