"""Warm processes: a worker that does job after job, so that equal graphs are compiled once.

A worker takes jobs of one graph and one environment. Whatever goes wrong in it retires it:
the next job finds a process as new.
"""

from __future__ import annotations

import pathlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

from runner.batch.child import Child
from runner.batch.standby import Standby
from runner.record.events import Ended, Event

#: Seconds that an idle worker has to leave before it is ended.
_LEAVE_S = 10.0


class WarmWorker:
    """Keeps one process for the jobs of a slot.

    Args:
        standby: Starts processes.
    """

    def __init__(self, standby: Standby) -> None:
        self.key: str | None = None
        self.jobs = 0
        self._environment: Mapping[str, str] = {}
        self._child: Child | None = None
        self._standby = standby

    def lend(
        self,
        request: Mapping[str, Any],
        environment: Mapping[str, str],
        log: pathlib.Path,
        *,
        key: str,
        loaded: bool = False,
    ) -> Lease:
        """Hand a job to the process, or to a new one if it cannot take it.

        Args:
            request: What to do.
            environment: Variables that the job's process must have, its slot's among them.
            log: File that takes what is printed meanwhile.
            key: The job's graph.
            loaded: Whether a new process may have loaded torch_xla already.
        """
        child = self._child
        fits = (key, environment) == (self.key, self._environment)
        if child is None or child.exit_code() is not None or not fits:
            self.retire()
            child = self._child = self._standby.child(environment, log, loaded=loaded)
            self.key, self._environment = key, environment
        self.jobs += 1
        child.send({**request, "log": str(log)})
        return Lease(self, child)

    def retire(self) -> None:
        """Let the process go: the next job gets a new one."""
        child, self._child = self._child, None
        self.key, self.jobs = None, 0
        if child is not None:
            child.dismiss(_LEAVE_S)
            child.close()


class Lease:
    """A warm process for the time of one job: a `Process` for `runner.batch.attempt`."""

    def __init__(self, worker: WarmWorker, child: Child) -> None:
        self._worker = worker
        self._child = child
        self._ended: Ended | None = None
        self._disturbed = False

    def events(self) -> Iterator[Event]:
        """The events that have arrived."""
        for event in self._child.events():
            if isinstance(event, Ended):
                self._ended = event
            yield event

    def wait(self, seconds: float = 0.1) -> None:
        """Wait until there is something to read, or the job ended, or time is up."""
        if not self._is_done():
            self._child.wait(seconds)

    def exit_code(self) -> int | None:
        """The job's exit code; of a process that ended, that of the process."""
        return 0 if self._is_done() else self._child.exit_code()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, which is not used again: the job may end unharmed."""
        self._disturbed = True
        self._child.signal(number)

    def kill(self) -> None:
        """End the job, if it still runs, and with it the process."""
        if not self._is_done():
            self._child.kill()

    def close(self) -> None:
        """Give the process back; it is kept if it is as good as new."""
        if self._disturbed or not self._is_done():
            self._child.kill()
            self._worker.retire()

    def _is_done(self) -> bool:
        return self._ended is not None and self._ended.exit_code == 0
