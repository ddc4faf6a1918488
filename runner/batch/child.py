"""One worker process: starting it, hearing it, ending it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from runner.record.events import Event
from runner.record.pipe import AHEAD, EventReader

#: The module that a worker runs.
WORKER = "runner.worker"
_WAIT_S = 0.1


def start_child(
    request: Mapping[str, Any], environment: Mapping[str, str], log: pathlib.Path
) -> Child:
    """Start a worker for one job."""
    child = Child(environment=environment, log=log)
    child.send(request)
    child.no_more()
    return child


class Child:
    """A worker in a process group of its own, so that Ctrl-C reaches it only through us.

    Args:
        environment: Variables set on top of this process's.
        log: File that takes the worker's standard output and error.
        ahead: Whether it shall load its libraries before it has a job.
    """

    def __init__(
        self, *, environment: Mapping[str, str], log: pathlib.Path, ahead: bool = False
    ) -> None:
        reading, writing = os.pipe()
        answered, answering = os.pipe()
        os.set_blocking(reading, False)
        self._descriptors = [reading, answering]
        arguments = [str(writing), str(os.getpid()), str(answered), *([AHEAD] if ahead else [])]
        try:
            with open(log, "ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", WORKER, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[writing, answered],
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
            self._ended = os.pidfd_open(self._process.pid)
            self._descriptors.append(self._ended)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(writing)
            os.close(answered)
        self._events = reading
        self._reader = EventReader(reading, answering)

    def send(self, request: Mapping[str, Any]) -> None:
        """Ask for a job. A worker that died meanwhile is no error here: `exit_code` tells."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()

    def no_more(self) -> None:
        """No further job will follow: the worker ends after those that it has."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def dismiss(self, seconds: float) -> None:
        """Let an idle worker end, and end it if it takes longer."""
        self.no_more()
        select.select([self._ended], [], [], seconds)
        self.kill()
        self._process.wait()

    def events(self) -> Iterator[Event]:
        """The events that have arrived."""
        return self._reader.read()

    def wait(self, seconds: float = _WAIT_S) -> None:
        """Wait until there is something to read, or the worker ended, or time is up."""
        awaited = [self._ended] if self._reader.closed else [self._ended, self._events]
        select.select(awaited, [], [], seconds)

    def exit_code(self) -> int | None:
        """The process's exit code; negative for a signal; None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the worker and everything that it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def close(self) -> None:
        """Let go of the pipes; the worker must have ended."""
        for descriptor in self._descriptors:
            os.close(descriptor)
