"""The ledger of a batch: which jobs it has, and where each stands, in the batch's folder.

A file of JSON lines that only grows: a record is one write, so that a batch killed at any
instant leaves whole records, but for a last one that readers leave out. A job's own
`result.json` is written first: what it says of a job that the ledger believes running holds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from runner.record.errors import ConfigError
from runner.record.files import strict_json
from runner.record.outcome import State

SCHEMA = 1
FILE_NAME = "ledger.jsonl"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A job of a batch, and where it stands.

    Attributes:
        number: Its number in the batch, from 0.
        overrides: What was asked for, without keys that only say how a job is run.
        hash: `runner.config.identity.job_hash` of its configuration.
        folder: Its run folder, relative to the batch's.
        state: Where it stands.
        exit_code: What it ended with; None before.
        reason: Why, unless it succeeded.
        tries: How often it was started.
        seconds: How long all its tries took.
        steps: Completed updates.
        final: The metrics that it ended with.
    """

    number: int
    overrides: tuple[str, ...]
    hash: str
    folder: str
    state: State = State.PENDING
    exit_code: int | None = None
    reason: str = ""
    tries: int = 0
    seconds: float = 0.0
    steps: int = 0
    final: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """What tells the job from the others, for people."""
        return " ".join(self.overrides)

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON values."""
        plain: dict[str, Any] = strict_json(dataclasses.asdict(self))
        plain["state"] = self.state.value
        return plain


@dataclasses.dataclass(frozen=True)
class Command:
    """The command line that began a batch.

    Attributes:
        overrides: Every `key=value`.
        config_dir: The user's own YAML files, or None.
        cwd: The folder that it was started in.
    """

    overrides: tuple[str, ...]
    config_dir: str | None
    cwd: str


class Ledger:
    """A batch's ledger, open for writing. The batch's folder is locked by the caller.

    Args:
        folder: The batch's folder; a ledger in it is continued.
        command: What began the batch; noted in a new ledger.

    Raises:
        ConfigError: The ledger in the folder cannot be read.
    """

    def __init__(self, folder: pathlib.Path, command: Command) -> None:
        self.folder = folder
        path = folder / FILE_NAME
        self.entries: dict[int, Entry] = {}
        new = not path.exists()
        if not new:
            length, self.entries, _ = _read(path)
            os.truncate(path, length)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the batch
        if new:
            self._append({"kind": "batch", "schema": SCHEMA, **dataclasses.asdict(command)})

    def close(self) -> None:
        """Let go of the file."""
        self.commit()
        self._file.close()

    def put(self, entry: Entry) -> None:
        """Note where a job stands now; it takes the place of the one with its number.

        Not synced to the disk one by one: a job's result is, and it is what holds.
        """
        self.entries[entry.number] = entry
        self._append({"kind": "job", **entry.to_json()})

    def commit(self) -> None:
        """Wait until what was noted would survive a power cut."""
        os.fsync(self._file.fileno())

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")


def read_ledger(folder: pathlib.Path) -> tuple[dict[int, Entry], Command]:
    """The jobs of the batch in a folder, by number, and what began it.

    Raises:
        ConfigError: There is no ledger, or it cannot be read.
    """
    _, entries, command = _read(folder / FILE_NAME)
    return entries, command


def _read(path: pathlib.Path) -> tuple[int, dict[int, Entry], Command]:
    entries: dict[int, Entry] = {}
    command = None
    length = 0
    try:
        for line, record in _records(path):
            length += len(line)
            kind = record.pop("kind")
            if kind == "batch":
                command = _command(record)
            else:
                entry = _entry(record)
                entries[entry.number] = entry
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} must be the ledger of a batch: {error}") from error
    if command is None:
        raise ConfigError(f"{path} must be the ledger of a batch; it does not begin as one")
    return length, entries, command


def _records(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line with its record."""
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield line, json.loads(line)


def _command(record: dict[str, Any]) -> Command:
    if record.pop("schema") != SCHEMA:
        raise ValueError(f"its schema must be {SCHEMA}")
    return Command(**{**record, "overrides": tuple(record["overrides"])})


def _entry(record: dict[str, Any]) -> Entry:
    final = {name: float(value) for name, value in record.pop("final").items()}
    state, overrides = State(record.pop("state")), tuple(record.pop("overrides"))
    return Entry(**record, state=state, overrides=overrides, final=final)
