"""The pipe of events from a worker to its parent, and that of the answers to some of them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from runner.record.events import Event, Saving, decode, encode

#: Argument of a worker that loads its libraries before it has a job.
AHEAD = "ahead"

_RECORDED = b"."


class EventWriter:
    """The worker's end. A parent that is gone is noticed elsewhere; here it is ignored.

    Args:
        descriptor: The pipe's writing end.
        answers: The reading end of the pipe of answers; None for a worker that never saves.
    """

    def __init__(self, descriptor: int, answers: int | None = None) -> None:
        self._descriptor = descriptor
        self._answers = answers
        self._lock = threading.Lock()

    def send(self, event: Event) -> None:
        """Write one event; safe to call from several threads. `Saving` waits for its answer.

        Raises:
            ConnectionError: The parent went away without an answer.
        """
        data = encode(event)
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except BrokenPipeError:
                pass
        if not isinstance(event, Saving) or self._answers is None:
            return
        if os.read(self._answers, len(_RECORDED)) != _RECORDED:
            raise ConnectionError("the runner is gone")


class EventReader:
    """The parent's end: bytes in, whole events out.

    Args:
        descriptor: The pipe's reading end, in non-blocking mode.
        answers: The writing end of the pipe of answers, if there is one.
    """

    def __init__(self, descriptor: int, answers: int | None = None) -> None:
        self._descriptor = descriptor
        self._answers = answers
        self._rest = b""
        self.closed = False

    def read(self) -> Iterator[Event]:
        """The events that have arrived; sets `closed` at the end of the stream.

        Raises:
            ValueError: A whole line is not an event.
        """
        while not self.closed:
            try:
                chunk = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return
            self.closed = not chunk
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for event in (decode(line) for line in lines if line):
                yield event
                # Whoever asks for the next event has recorded this one.
                if isinstance(event, Saving) and self._answers is not None:
                    with contextlib.suppress(BrokenPipeError):
                        os.write(self._answers, _RECORDED)
