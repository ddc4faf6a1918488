"""A file that grows by whole records only, whatever happens to the disk or the process.

A record reaches the kernel in one write, so a killed process leaves whole records; a write
that a full disk cuts short is taken back. Records that could not be written wait in memory
and go first when the disk has room again.
"""

from __future__ import annotations

import io
import os
import pathlib

#: Records that wait for room on the disk; beyond it new ones are dropped.
BACKLOG = 10_000


class Appender:
    """Appends records to a file, which is opened with the first `flush`.

    Args:
        path: The file; its folder is made if need be.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.backlog: list[bytes] = []
        self._file: io.FileIO | None = None

    def write(self, record: bytes) -> None:
        """Queue a whole record; `flush` writes it."""
        if len(self.backlog) < BACKLOG:
            self.backlog.append(record)

    def flush(self) -> None:
        """Write what is queued.

        Raises:
            OSError: Some could not be written; they are tried again with the next `flush`.
        """
        done = 0
        try:
            for record in self.backlog:
                self._write(record)
                done += 1
        finally:
            del self.backlog[:done]

    def sync(self) -> None:
        """Write what is queued and wait until it would survive a power cut.

        Raises:
            OSError: Some could not be written; see `flush`.
        """
        self.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is queued and close.

        Raises:
            OSError: Some could not be written, and will not be.
        """
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self, record: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(size)
            raise
