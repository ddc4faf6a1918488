"""metrics.jsonl: one strict-JSON object a logged step or evaluation, in the order of steps."""

from __future__ import annotations

import json
import os
import pathlib

from runner.observe.appender import Appender
from runner.observe.metrics import Point
from runner.record.files import strict_json


class Journal:
    """Appends points to a file of JSON lines.

    Args:
        path: The file; an existing one is continued.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._appender = Appender(path)

    def write(self, point: Point) -> None:
        """Append one point: {"step": ..., "time": seconds since the epoch, tag: value, ...}.

        Raises:
            OSError: It could not be written; it will be tried again with the next one.
        """
        entry = {"step": point.step, "time": point.time, **point.values}
        line = json.dumps(strict_json(entry), separators=(",", ":"), allow_nan=False)
        self._appender.write(line.encode() + b"\n")
        self._appender.flush()

    def sync(self) -> None:
        """Wait until what was written would survive a power cut.

        Raises:
            OSError: It cannot be written.
        """
        self._appender.sync()

    def purge(self, step: int) -> None:
        """Take out the points from `step` on, because these steps will be repeated.

        Points are in the order of steps, so this cuts the file off, in one system call that
        needs no room on the disk. A last line that a crash cut short goes as well.

        Raises:
            OSError: The file could not be cut.
        """
        kept = [line for line in self._appender.backlog if not _is_past(line, step)]
        self._appender.backlog[:] = kept
        path = self._appender.path
        if path.exists():
            os.truncate(path, _length_before(path, step))

    def close(self) -> None:
        """Write what waits for room and close.

        Raises:
            OSError: There was no room.
        """
        self._appender.close()


def _length_before(path: pathlib.Path, step: int) -> int:
    length = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or _is_past(line, step):
                break
            length += len(line)
    return length


def _is_past(line: bytes, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] >= step)
    except (ValueError, KeyError, TypeError):
        return False
