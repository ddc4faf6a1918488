"""The plan of a batch: every job composed, valid, numbered, with a folder, before any starts.

A batch that goes on keeps its numbers and folders: a job is known by what was asked for.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence

from omegaconf import DictConfig

from runner.batch.job import BatchJob
from runner.batch.ledger import FILE_NAME, Entry, read_ledger
from runner.config.compose import Composer
from runner.config.identity import graph_key, is_operational, job_hash
from runner.config.schema import BatchConfig
from runner.config.sweep import ComposedJob, SweepComposer
from runner.record.errors import ConfigError
from runner.record.outcome import State, result_from_json
from runner.record.rundir import RunDir


class Planner:
    """Turns what was asked for into jobs.

    Args:
        composer: Composes their configurations.
        hydra: Hydra's section of the batch.
        folder: The batch's folder.
        entries: The jobs that it has already, by number.
        swept: Keys that the jobs differ in: a job is known by these, whatever they are.
    """

    def __init__(
        self,
        composer: Composer,
        hydra: DictConfig,
        *,
        folder: pathlib.Path,
        entries: Mapping[int, Entry],
        swept: Collection[str] = (),
    ) -> None:
        self.folder = folder
        self._composer = composer
        self._swept = swept
        self._sweep = SweepComposer(composer, hydra)
        self._next = max(entries, default=-1) + 1
        self._known: dict[tuple[str, ...], collections.deque[Entry]] = {}
        self._folders = {entry.folder for entry in entries.values()}
        for number in sorted(entries):
            entry = settled(entries[number], folder)
            self._known.setdefault(entry.overrides, collections.deque()).append(entry)

    def job(self, overrides: Sequence[str]) -> BatchJob:
        """The job that these overrides ask for: one that the batch has, or a new one.

        Raises:
            ConfigError: Its configuration is wrong, or its folder is another job's.
        """
        wanted = self._wanted(overrides)
        known = self._known.get(wanted)
        earlier = known.popleft() if known else None
        number = self._next if earlier is None else earlier.number
        composed = self._sweep.job(overrides, number=number)
        entry = self._entry(composed, wanted, number=number, earlier=earlier)
        self._next = max(self._next, number + 1)
        return BatchJob(
            number=number,
            config=composed.config,
            config_yaml=composed.config_yaml,
            overrides=composed.overrides,
            run_dir=RunDir(self.folder / entry.folder),
            key=graph_key(composed.config),
            entry=entry,
        )

    def refused(self, overrides: Sequence[str], error: ConfigError) -> Entry:
        """The entry of a job that `job` raised for: it has a number, and will not be run."""
        number, self._next = self._next, self._next + 1
        return Entry(
            number,
            self._wanted(overrides),
            hash="",
            folder=f"{number}-refused",
            state=State.FAILED,
            exit_code=int(error.exit_code),
            reason=str(error),
        )

    def _wanted(self, overrides: Sequence[str]) -> tuple[str, ...]:
        return tuple(
            item.input_line or ""
            for item in self._composer.parse(overrides)
            if item.key_or_group in self._swept or not is_operational(item.key_or_group)
        )

    def _entry(
        self, composed: ComposedJob, wanted: tuple[str, ...], *, number: int, earlier: Entry | None
    ) -> Entry:
        new = Entry(number, wanted, job_hash(composed.config), composed.folder)
        if earlier is None:
            if new.folder in self._folders:
                raise ConfigError(
                    "hydra.sweep.subdir must give each job a folder of its own; "
                    f"{new.folder!r} is another's"
                )
            self._folders.add(new.folder)
            return new
        if earlier.hash == new.hash and earlier.state.good:
            return earlier
        return dataclasses.replace(
            new, folder=earlier.folder, tries=earlier.tries, seconds=earlier.seconds
        )


def known_entries(folder: pathlib.Path, *, resume: bool) -> dict[int, Entry]:
    """The jobs that the batch in this folder has; none in a folder without a batch.

    Raises:
        ConfigError: It has some, and nobody asked to go on with them.
    """
    if not (folder / FILE_NAME).exists():
        return {}
    entries, _ = read_ledger(folder)
    if not resume:
        done = sum(settled(entry, folder).state is State.SUCCEEDED for entry in entries.values())
        raise ConfigError(
            f"{folder} holds a batch of {len(entries)} jobs, of which {done} succeeded: go on "
            "with it by resume=true, or choose another folder (batch.name)"
        )
    return entries


def settled(entry: Entry, folder: pathlib.Path) -> Entry:
    """An entry as its job's own result has it, where the batch was killed before noting it."""
    if entry.state is not State.RUNNING:
        return entry
    try:
        plain = json.loads((folder / entry.folder / "result.json").read_text())
        result = result_from_json(plain)
    except (OSError, ValueError):
        return entry
    if not result.state.ended:
        return entry
    return dataclasses.replace(
        entry,
        state=result.state,
        exit_code=result.exit_code,
        reason=result.reason,
        steps=result.steps,
        final={name: float(value) for name, value in result.final.items()},
    )


def shared_settings(jobs: Sequence[BatchJob]) -> BatchConfig:
    """The `batch` section, which all jobs have in common.

    Raises:
        ConfigError: Two jobs differ in it.
    """
    first = jobs[0].config.batch
    for job in jobs:
        if job.config.batch != first:
            raise ConfigError(
                "batch.* must be the same for all jobs of a batch; jobs "
                f"{jobs[0].number} and {job.number} differ: {first} and {job.config.batch}"
            )
        if job.config.ray != jobs[0].config.ray:
            raise ConfigError("ray.* must be the same for all jobs of a batch")
    return first
