"""One worker process: starting it, hearing it, ending it."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from runner.record.events import Event
from runner.record.pipe import EventReader

_WAIT_S = 0.1


class Child:
    """A worker in a process group of its own, so that Ctrl-C reaches it only through us.

    Args:
        request: What the worker shall do, as JSON values.
        environment: Variables set on top of this process's.
        log: File that takes the worker's standard output and error.
    """

    def __init__(
        self, request: Mapping[str, Any], *, environment: Mapping[str, str], log: pathlib.Path
    ) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runner.worker", str(writing), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                env={**os.environ, **environment},
                start_new_session=True,
            )
        os.close(writing)
        self._descriptor = reading
        self._reader = EventReader(reading)
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            pass  # It died at once; `exit_code` tells.

    def events(self) -> Iterator[Event]:
        """The events that have arrived."""
        return self._reader.read()

    def wait(self, seconds: float = _WAIT_S) -> None:
        """Wait until there is something to read, or the worker ended, or time is up."""
        import select

        if self._reader.closed:
            time.sleep(0.01)
            return
        select.select([self._descriptor], [], [], seconds)

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
        """Let go of the pipe; the worker must have ended."""
        os.close(self._descriptor)
