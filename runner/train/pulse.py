"""A sign of life now and then, from whatever goes forward without another event."""

from __future__ import annotations

import time
from collections.abc import Callable

from runner.record.events import Alive, Event

_EVERY_S = 1.0


class Pulse:
    """Sends `Alive`, but not more than once a second.

    Args:
        send: Where events go.
        clock: Monotonic seconds.
    """

    def __init__(
        self, send: Callable[[Event], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._send = send
        self._clock = clock
        self._last_s = clock()

    def beat(self, step: int) -> None:
        """Something went forward."""
        now = self._clock()
        if now - self._last_s >= _EVERY_S:
            self._last_s = now
            self._send(Alive(step))
