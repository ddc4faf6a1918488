"""The pipe of events from a worker to its parent."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from runner.record.events import Event, decode, encode


class EventWriter:
    """The worker's end. A parent that is gone is noticed elsewhere; here it is ignored.

    Args:
        descriptor: The pipe's writing end.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, event: Event) -> None:
        """Write one event; safe to call from several threads."""
        data = encode(event)
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except BrokenPipeError:
                pass


class EventReader:
    """The parent's end: bytes in, whole events out.

    Args:
        descriptor: The pipe's reading end, in non-blocking mode.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
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
            yield from (decode(line) for line in lines if line)
