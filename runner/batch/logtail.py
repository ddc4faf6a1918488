"""Reads what a worker adds to its log, line by line."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

#: Starts of lines that the XLA runtime prints at every start and that tell a user nothing.
_NOISE = (b"WARNING: All log messages before absl::InitializeLog", b"W0000 ", b"I0000 ", b"E0000 ")


class LogTail:
    """Follows a growing file from its present end.

    Args:
        path: The file; it exists.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._position = 0
        self._rest = b""

    def lines(self, *, final: bool = False) -> Iterator[str]:
        """New whole lines without the runtime's noise; with `final` a last part line too.

        A file that somebody removed has none.
        """
        new = b""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._position)
            new = file.read()
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        if final and self._rest:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            if not line.startswith(_NOISE):
                yield line.decode("utf-8", errors="replace").rstrip("\r")
