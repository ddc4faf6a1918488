"""The run folder: what is where in it, and who may write to it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import socket
from typing import Any

import filelock

from runner.record.errors import BusyError


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths of one run; the names are part of the contract (README, "Run folder")."""

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """The resolved configuration, values from the environment left as interpolations."""
        return self.path / "config.yaml"

    @property
    def overrides(self) -> pathlib.Path:
        """The command line's overrides, one a line."""
        return self.path / "overrides.txt"

    def asked(self) -> tuple[str, ...]:
        """The command line's overrides; none where they were not kept."""
        try:
            return tuple(self.overrides.read_text(encoding="utf-8").splitlines())
        except OSError:
            return ()

    @property
    def environment(self) -> pathlib.Path:
        """Versions, device, host, git commit."""
        return self.path / "env.json"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON object a logged step or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> pathlib.Path:
        """Everything that the worker printed."""
        return self.path / "log.txt"

    @property
    def tensorboard(self) -> pathlib.Path:
        """TensorBoard event files."""
        return self.path / "tb"

    @property
    def checkpoints(self) -> pathlib.Path:
        """One folder a checkpoint, `step-00000100`."""
        return self.path / "checkpoints"

    @property
    def result(self) -> pathlib.Path:
        """The outcome, `result.json`."""
        return self.path / "result.json"

    def create(self) -> None:
        """Make the folder and what must exist in it before the worker starts."""
        self.tensorboard.mkdir(parents=True, exist_ok=True)
        self.log.touch()

    def in_use(self) -> bool:
        """Whether a process of this host that has the folder still lives; of others, whether one
        ever had it. For shows only: `lock` decides.
        """
        try:
            who = json.loads((self.path / ".lock.json").read_text())
            if who["host"] != socket.gethostname():
                return True
            os.kill(who["pid"], 0)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def lock(self) -> filelock.BaseFileLock:
        """Take the folder for this process; the lock ends with the process.

        Raises:
            BusyError: Another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        holder = self.path / ".lock.json"
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise BusyError(f"{self.path} is in use by {_holder_text(holder)}") from None
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        return lock


def _holder_text(holder: pathlib.Path) -> str:
    try:
        who: dict[str, Any] = json.loads(holder.read_text())
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def stamp(now: datetime.datetime) -> str:
    """A folder name that two runs in the same second do not share."""
    return now.strftime("%Y%m%d-%H%M%S-%f")
