"""Where a run takes place: what shows it, what stops it, and what its worker is.

A run alone has a console, takes the signals of this process and starts a process of its own.
A job of a batch has a row in a table, is stopped with the batch or for itself, and may be
handed to a process that is warm already.
"""

from __future__ import annotations

import dataclasses
import pathlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from runner.config.hosts import Host
from runner.observe.display import Display
from runner.record.events import Event
from runner.record.outcome import Attempt


class Stop(Protocol):
    """Whether a run has been asked to stop."""

    @property
    def interrupts(self) -> int:
        """How often Ctrl-C was pressed."""

    @property
    def terminated(self) -> bool:
        """Whether it was asked to save and end."""

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for in any way."""

    def verdict(self, attempt: Attempt) -> Attempt:
        """What an attempt that may have been stopped comes to."""


class Process(Protocol):
    """A worker that does one job. See `runner.batch.child.Child`."""

    def events(self) -> Iterator[Event]:
        """The events that have arrived."""

    def wait(self, seconds: float = ...) -> None:
        """Wait until there is something to read, or the job ended, or time is up."""

    def exit_code(self) -> int | None:
        """The job's exit code; negative for a signal; None while it runs."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker, if it still runs."""

    def kill(self) -> None:
        """End the job, if it still runs, and everything that it started."""

    def close(self) -> None:
        """Let go of the worker; the job must have ended."""


#: Starts a worker: request, variables on top of this process's, file for what it prints.
Start = Callable[[Mapping[str, Any], Mapping[str, str], pathlib.Path], Process]


@dataclasses.dataclass(frozen=True)
class Seat:
    """Where a run takes place.

    Attributes:
        display: What shows it.
        stop: What stops it.
        start: Starts its worker.
        elsewhere: Whether that is on another machine, which looks for its own hardware.
        host: Which of the job's hosts this machine is.
    """

    display: Display
    stop: Stop
    start: Start
    elsewhere: bool = False
    host: Host = dataclasses.field(default_factory=Host)
