"""What saving costs a step, and what restoring costs beside reading the same bytes.

Saving: the same loop on the same backend, with a save every 50 steps and without, in turns, in
one process. Restoring: a state of a gigabyte is saved; then, each time with the files thrown out
of the page cache first, its files are read, and it is restored, in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

from runner.cli.app import conf_folder
from runner.config.compose import Composer
from runner.config.hardware import find_hardware
from runner.config.schema import CheckpointConfig, Config
from runner.config.trust import trusted_packages
from runner.record.storage import LocalStorage

SAVING_TARGET = 1.03
RESTORING_TARGET = 1.5
_CHUNK = 1 << 22


def main() -> int:
    """Measure both and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="bench checkpoint", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200, help="steps a round")
    parser.add_argument("--every", type=int, default=50, help="steps between two saves")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the state to restore")
    parser.add_argument("--folder", default=None, help="where to write; default: the system's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", help="as for the runner")
    asked = parser.parse_args()
    composer = Composer(conf_folder(), extra=None, trusted=trusted_packages())
    config = composer.config(asked.overrides or ["job=mlp"])
    os.environ.update(find_hardware(config.hardware).environment())
    rounds, at = asked.rounds, asked.folder
    figures = saving(config, rounds=rounds, steps=asked.steps, every=asked.every, at=at)
    figures |= restoring(asked.gigabytes, rounds=rounds, at=at)
    if asked.json:
        print(json.dumps(figures, indent=2))
    else:
        _show(config, figures, every=asked.every, gigabytes=asked.gigabytes)
    good = figures["saving_ratio"] <= SAVING_TARGET
    return 0 if good and figures["restoring_ratio"] <= RESTORING_TARGET else 1


def _show(config: Config, figures: dict[str, float], *, every: int, gigabytes: float) -> None:
    print(f"job={config.job.name} backend={config.backend.name}, saving every {every} steps")
    print(f"  without saving {figures['plain_ms']:9.3f} ms a step")
    print(f"  with saving    {figures['saving_ms']:9.3f} ms a step")
    print(f"  ratio          {figures['saving_ratio']:9.4f}    (target: at most {SAVING_TARGET})")
    print(f"  a pause        {figures['pause_ms']:9.3f} ms a save")
    print(f"restoring {gigabytes:g} GB")
    print(f"  reading        {figures['reading_s']:9.3f} s")
    print(f"  restoring      {figures['restoring_s']:9.3f} s")
    print(f"  ratio          {figures['restoring_ratio']:9.4f}    (target: at most 1.5)")


def saving(
    config: Config, *, rounds: int, steps: int, every: int, at: str | None
) -> dict[str, float]:
    """Milliseconds a step of the loop with saves and without, and their ratio, paired."""
    from runner.backends import registry
    from runner.record.events import CheckpointSaved, Event
    from runner.train.build import build
    from runner.train.checkpoint import Label
    from runner.train.loop import Training
    from runner.train.profiler import Profiler
    from runner.train.saver import Saver
    from runner.train.signals import StopFlag

    built = build(config)
    built = dataclasses.replace(built, data=dataclasses.replace(built.data, heldout=None))
    backend = registry.build(
        config.backend.name,
        built.recipe,
        on_start=lambda role: None,
        on_record=lambda record: None,
        strict=False,
    )
    events: list[Event] = []

    def run(settings: CheckpointConfig, folder: str) -> float:
        short = dataclasses.replace(config, steps=steps, eval_every=0, checkpoint=settings)
        storage = LocalStorage(pathlib.Path(folder))
        saver = Saver(storage, settings, label=Label({}, {}), send=events.append)
        stop = StopFlag()
        training = Training(
            short,
            built,
            backend,
            send=events.append,
            stop=stop,
            saver=saver,
            profiler=Profiler(None, folder=pathlib.Path(folder), send=events.append),
        )
        # The run's last state is saved after the last step, when there is nothing to slow down.
        saver.finish = lambda step, take: None  # type: ignore[method-assign]
        start = time.perf_counter()
        training.train()
        seconds = time.perf_counter() - start
        with saver:
            return seconds / steps

    plain = CheckpointConfig(enabled=False)
    saves = CheckpointConfig(every_s=None, every_steps=every)
    with tempfile.TemporaryDirectory(dir=at) as folder:
        run(plain, folder), run(saves, folder)
        events.clear()
        pairs = []
        for number in range(rounds):
            order = (plain, saves) if number % 2 else (saves, plain)
            times = {settings.enabled: run(settings, folder) for settings in order}
            pairs.append((times[False], times[True]))
    plain_ms, saving_ms = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    pauses = [1e3 * event.seconds for event in events if isinstance(event, CheckpointSaved)]
    return {
        "plain_ms": plain_ms,
        "saving_ms": saving_ms,
        "saving_ratio": statistics.median(with_ / without for without, with_ in pairs),
        "pause_ms": statistics.median(pauses),
    }


def restoring(gigabytes: float, *, rounds: int, at: str | None) -> dict[str, float]:
    """Seconds to read a state's files and to restore it, and their ratio, paired."""
    import torch

    from runner.backends.snapshot import snapshot_of
    from runner.backends.state import TrainState
    from runner.train.checkpoint import Label, load, save

    count = int(gigabytes * 1e9 / 4 / 24)
    tensors = {f"layer.{i}": torch.randn(count) for i in range(24)}
    with tempfile.TemporaryDirectory(dir=at) as folder:
        storage = LocalStorage(pathlib.Path(folder))
        state = TrainState(tensors, {}, {}, step=1)
        name = save(storage, snapshot_of(state), label=Label({}, {})).name
        files = sorted((pathlib.Path(folder) / name).iterdir())

        def read() -> float:
            _throw_out(files)
            start = time.perf_counter()
            for path in files:
                with open(path, "rb", buffering=0) as file:
                    while file.read(_CHUNK):
                        pass
            return time.perf_counter() - start

        def restore() -> float:
            _throw_out(files)
            start = time.perf_counter()
            _, loaded = load(storage, name)
            for key, tensor in loaded.items():
                own = tensors[key.partition("/")[2]]
                own.copy_(tensor)
            return time.perf_counter() - start

        read(), restore()
        pairs = [(read(), restore()) for _ in range(rounds)]
    reading_s, restoring_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(restored / plain for plain, restored in pairs)
    return {"reading_s": reading_s, "restoring_s": restoring_s, "restoring_ratio": ratio}


def _throw_out(files: list[Any]) -> None:
    """Have the next read of these files come from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
