"""A batch on this machine: its folder, its lock, its ledger, its slots, its board."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from runner.batch.job import BatchJob
from runner.batch.ledger import Command, Entry, Ledger
from runner.batch.queue import JobQueue, JobSource
from runner.batch.session import Session, Station
from runner.batch.slots import plan_slots
from runner.batch.station import SlotStation
from runner.config.schema import BatchConfig, HardwareConfig
from runner.observe.board import Board
from runner.record.errors import ExitCode
from runner.record.rundir import RunDir

Note = Callable[[Entry], None]
SourceMaker = Callable[[Mapping[int, Entry], Note], JobSource]


class Batch:
    """Runs jobs, in one or several sessions, and keeps account of them.

    Args:
        folder: The batch's folder.
        settings: The `batch` section.
        command: What began the batch.
    """

    def __init__(self, folder: pathlib.Path, settings: BatchConfig, command: Command) -> None:
        self.folder = folder
        self.settings = settings
        self.entries: dict[int, Entry] = {}
        self._command = command

    def run_all(self, jobs: Sequence[BatchJob], stations: Sequence[Station]) -> ExitCode:
        """Run the jobs of a grid that have not succeeded yet; returns what stopped it, or DONE.

        Raises:
            BusyError: Another process runs this batch.
        """

        def grid(entries: Mapping[int, Entry], note: Note) -> JobSource:
            for job in jobs:
                _forget_other(job, entries.get(job.number))
                note(job.entry)
            return JobQueue(jobs, retries=self.settings.retries)

        return self.run(grid, stations)

    def run(self, make: SourceMaker, stations: Sequence[Station]) -> ExitCode:
        """Run the jobs of a source; returns what stopped it, or DONE.

        Args:
            make: Makes the source, given the jobs that the batch has and what to call with the
                entry of each job that it will have.
            stations: Where they run.

        Raises:
            BusyError: Another process runs this batch.
        """
        with self._open() as (ledger, board):
            source = make(dict(ledger.entries), functools.partial(_note, ledger, board))
            ledger.commit()
            if ledger.entries:
                board.say(board.counts())
            session = Session(source, stations, ledger=ledger, settings=self.settings, board=board)
            try:
                return session.run()
            finally:
                self.entries = dict(ledger.entries)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Ledger, Board]]:
        with RunDir(self.folder).lock():
            ledger, board = Ledger(self.folder, self._command), Board()
            try:
                yield ledger, board
            finally:
                board.close()
                ledger.close()


def slot_stations(
    hardware: Sequence[HardwareConfig], settings: BatchConfig, *, folder: pathlib.Path
) -> list[SlotStation]:
    """The slots of this machine, for jobs with these `hardware` sections.

    Raises:
        DeviceError: A job needs a TPU that is not there.
        ConfigError: The chips cannot be shared as asked.
    """
    slots = plan_slots(hardware, settings)
    warm = settings.isolation == "warm"
    return [SlotStation(slot, batch_folder=folder, warm=warm) for slot in slots]


def _note(ledger: Ledger, board: Board, entry: Entry) -> None:
    if ledger.entries.get(entry.number) != entry:
        ledger.put(entry)
    board.add(entry.number, entry.overrides, entry.state)


def _forget_other(job: BatchJob, earlier: Entry | None) -> None:
    """A result of another configuration must not pass for the job's, whenever we are killed."""
    if earlier is not None and earlier.hash != job.entry.hash:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(job.run_dir.result)
