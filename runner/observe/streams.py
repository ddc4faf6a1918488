"""A terminal or pipe that may go away, or may not know every character."""

from __future__ import annotations

import os
from typing import TextIO


class SafeStream:
    """A text stream that a job can be watched through, and that cannot end the job.

    Characters that the stream's encoding lacks become "?". After the reader is gone, or the
    disk behind a redirection is full, further text goes nowhere.

    Args:
        stream: The stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return self._stream.encoding or "ascii"

    def isatty(self) -> bool:
        """Whether a person may be looking."""
        return not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write what can be written."""
        if not self._gone:
            known = text.encode(self.encoding, "replace").decode(self.encoding)
            try:
                self._stream.write(known)
            except (OSError, ValueError) as error:
                self._failed(error)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, BlockingIOError):
            return
        self._gone = True
        # What is still buffered would fail again when the interpreter ends, and change its
        # exit code: let it go nowhere.
        try:
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
        except (OSError, ValueError):
            return
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
