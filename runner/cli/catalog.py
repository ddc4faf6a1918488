"""What runs and batches a folder holds: for `ls` and `report`."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Iterator

from runner.batch.ledger import FILE_NAME, read_ledger
from runner.batch.plan import settled
from runner.observe.history import read_result
from runner.record.errors import ConfigError
from runner.record.outcome import Result, State
from runner.record.rundir import RunDir

#: Where runs and batches are when nothing else is said.
PLACES = ("outputs", "multirun")
#: How deep below the folder that was asked for a run may lie: outputs/JOB/STAMP.
_DEPTH = 3


@dataclasses.dataclass(frozen=True)
class Found:
    """A run or a batch.

    Attributes:
        path: Its folder.
        result: Of a run.
        states: Of a batch: how many jobs are in which state.
    """

    path: pathlib.Path
    result: Result | None
    states: dict[State, int]


def find(root: pathlib.Path) -> Iterator[Found]:
    """The runs and batches in a folder, in the order of their names; a batch's jobs left out.

    A folder that is a batch itself gives its jobs.
    """
    if (root / FILE_NAME).exists():
        yield from (found for found in _jobs(root) if found is not None)
    else:
        yield from _below(root, _DEPTH)


def run_folders(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every run folder in a folder, those of batches included, in the order of their numbers."""
    if (root / "result.json").exists():
        yield root
        return
    for path in sorted(_folders(root), key=_by_number):
        if (path / "result.json").exists():
            yield path
        else:
            yield from run_folders(path)


def _below(path: pathlib.Path, depth: int) -> Iterator[Found]:
    if (path / FILE_NAME).exists():
        yield Found(path, None, _states(path))
    elif (result := read_result(RunDir(path))) is not None:
        yield Found(path, result, {})
    elif depth:
        for folder in sorted(_folders(path), key=_by_number):
            yield from _below(folder, depth - 1)


def _jobs(batch: pathlib.Path) -> Iterator[Found | None]:
    entries, _ = read_ledger(batch)
    for number in sorted(entries):
        path = batch / entries[number].folder
        result = read_result(RunDir(path)) or Result(job=entries[number].folder, backend="")
        yield Found(path, result, {})


def _states(batch: pathlib.Path) -> dict[State, int]:
    try:
        entries, _ = read_ledger(batch)
    except ConfigError:
        return {}
    running = RunDir(batch).in_use()
    counts: collections.Counter[State] = collections.Counter()
    for entry in entries.values():
        state = settled(entry, batch).state
        counts[State.CANCELLED if state is State.RUNNING and not running else state] += 1
    return dict(counts)


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    try:
        return [each for each in path.iterdir() if each.is_dir() and not each.is_symlink()]
    except OSError:
        return []


def _by_number(path: pathlib.Path) -> tuple[int, str]:
    """Jobs of a batch by their number, everything else by its name."""
    number = path.name.partition("-")[0]
    return (int(number) if number.isdigit() and len(number) < 7 else 0, path.name)
