"""A process that was started while the job before still ran, and waits for its own.

Starting takes a part of a second, and loading torch and torch_xla some more, for which a slot would
otherwise do nothing. A process on standby is as new: it has seen no job, and takes no device before
it has one.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Mapping

from runner.batch.child import Child


class Standby:
    """Starts the workers of a slot, one ahead where that is asked for."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._environment: Mapping[str, str] = {}
        self._loaded = False

    def prepare(self, environment: Mapping[str, str], *, load: bool) -> None:
        """Have a worker ready for the next job, if it can be started; does not wait for it.

        Args:
            environment: Variables on top of this process's.
            load: Whether it shall load torch and torch_xla.
        """
        if self._fits(environment, loaded=load):
            return
        self.dismiss()
        self._environment, self._loaded = environment, load
        # What it prints before it has a job has no place; one that dies is not used.
        nowhere = pathlib.Path(os.devnull)
        with contextlib.suppress(OSError):  # the job before it must not fail for that
            self._child = Child(environment=environment, log=nowhere, ahead=load)

    def child(
        self, environment: Mapping[str, str], log: pathlib.Path, *, loaded: bool = False
    ) -> Child:
        """A worker without a job: the one that is ready, or else a new one.

        Args:
            environment: Variables on top of this process's.
            log: File that takes what a new one prints; one that was ready is told in its request.
            loaded: Whether it may have loaded torch and torch_xla.
        """
        if not self._fits(environment, loaded=loaded):
            return Child(environment=environment, log=log)
        child, self._child = self._child, None
        assert child is not None
        return child

    def dismiss(self) -> None:
        """End the worker that is ready, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.dismiss(0.0)
            child.close()

    def _fits(self, environment: Mapping[str, str], *, loaded: bool) -> bool:
        child = self._child
        if child is None or child.exit_code() is not None:
            return False
        return environment == self._environment and self._loaded <= loaded
