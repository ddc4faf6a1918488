"""Progress as plain lines, where there is no terminal to draw on."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.text import Text

from runner.observe.metrics import Point
from runner.observe.progress import Progress, message_of
from runner.observe.streams import SafeStream
from runner.record.events import Event, Steps

#: A step's line is due after this many seconds, or this part of the run.
_EVERY_S = 10.0
_EVERY_PART = 0.1
#: Phases that are worth a line: they may take long.
_SAID = ("compiling", "waiting")


class PlainDisplay:
    """Writes a line for what is worth one.

    Args:
        stream: Where lines go.
        clock: Monotonic seconds.
    """

    def __init__(self, stream: SafeStream, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._progress = Progress(clock)
        self._last: tuple[float, int] | None = None

    def handle(self, event: Event, point: Point | None) -> None:
        """Say of an event what is worth saying."""
        phase = self._progress.phase
        self._progress.take(event, point)
        message = message_of(event)
        if message is not None:
            self.say(message)
        elif isinstance(event, Steps):
            self._say_step()
        elif self._progress.phase != phase and self._progress.phase.startswith(_SAID):
            self.say(self._progress.phase)

    def echo(self, line: str) -> None:
        """Pass on a line of the worker's log."""
        self.say(Text.from_ansi(line).plain)

    def say(self, message: str, *, warning: bool = False) -> None:
        """Write one line."""
        self._stream.write(f"warning: {message}\n" if warning else f"{message}\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is left on the screen."""

    def _say_step(self) -> None:
        progress, now = self._progress, self._clock()
        part = progress.steps * _EVERY_PART
        if self._last is not None and progress.step != progress.steps:
            last_s, last_step = self._last
            if now - last_s < _EVERY_S and not 0 < part <= progress.step - last_step:
                return
        self._last = (now, progress.step)
        total = f"/{progress.steps}" if progress.steps else ""
        self.say("  ".join([f"step {progress.step}{total}", *progress.figures()]))
