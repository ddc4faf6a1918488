"""Saving while training goes on: when, from which snapshot, and what is kept.

The loop stands still while a snapshot is taken between two steps; a thread writes it. At most
one save is under way. A save that fails leaves training and the checkpoints before it alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch

from runner.backends.snapshot import Snapshot
from runner.config.schema import CheckpointConfig
from runner.record.errors import CheckpointError, NonFiniteError
from runner.record.events import CheckpointSaved, Event, Notice, Saving
from runner.record.manifest import folder_name
from runner.record.storage import Storage
from runner.train.checkpoint import Label, Saved, save
from runner.train.hosts import ALONE, Hosts
from runner.train.pulse import Pulse

#: Seconds between two tries to save the last state of a run.
_RETRY_S = 1.0


class Saver:
    """Saves a run's checkpoints.

    Args:
        storage: Where to.
        config: When to save and what to keep.
        label: What goes into every manifest.
        send: Where events go.
        hosts: Those that hold the state together; the first tidies up.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        storage: Storage,
        config: CheckpointConfig,
        *,
        label: Label,
        send: Callable[[Event], None],
        hosts: Hosts = ALONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._config = config
        self._label = label
        self._send = send
        self._hosts = hosts
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failures = 0
        self._pulse = Pulse(send)
        self.begin(0)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let a save that is under way come to its end, however training ended."""
        self._join()

    def begin(self, step: int) -> None:
        """Training goes on from `step`, which needs no saving."""
        self._saved_step = self._tried_step = step
        self._tried_s = self._clock()

    def due(self, step: int) -> bool:
        """Whether to save now, between two steps.

        Raises:
            CheckpointError: Too many saves in a row have failed.
            NonFiniteError: A parameter in the latest snapshot was not a number.
        """
        self._raise_error()
        config = self._config
        if not config.enabled or step <= self._tried_step:
            return False
        every = config.every_steps
        if every and step // every > self._tried_step // every:
            return True
        waited = self._clock() - self._tried_s
        return config.every_s is not None and waited >= config.every_s and not self._writing()

    def save(self, step: int, take: Callable[[int], Snapshot]) -> None:
        """Take a snapshot and begin to write it.

        sync: waits for the save before this one, and for the snapshot.

        Args:
            step: Completed updates.
            take: Gives the snapshot of that step; training must stand still meanwhile.
        """
        began = self._clock()
        self._join()
        self._tried_step, self._tried_s = step, began
        snapshot = take(step)
        paused_s = self._clock() - began
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, paused_s), name="saver", daemon=True
        )
        self._thread.start()

    def finish(self, step: int, take: Callable[[int], Snapshot]) -> None:
        """Save the last state, unless it is saved, and wait until all is written.

        Raises:
            CheckpointError: It could not be saved.
            NonFiniteError: A parameter in a snapshot was not a number.
        """
        self._join()
        self._raise_error()
        while self._config.enabled and self._saved_step != step:
            self.save(step, take)
            self._join()
            self._raise_error()
            if self._saved_step != step:
                time.sleep(_RETRY_S)

    def _writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self, snapshot: Snapshot, paused_s: float) -> None:
        began = self._clock()
        try:
            _check_finite(snapshot)
            self._send(Saving(snapshot.step))
            saved = save(
                self._storage,
                snapshot,
                label=self._label,
                hosts=self._hosts,
                progress=lambda: self._pulse.beat(snapshot.step),
            )
            self._done(snapshot.step, saved, paused_s=paused_s, write_s=self._clock() - began)
        except OSError as error:
            self._failed(snapshot.step, error)
        except Exception as error:
            self._error = error

    def _done(self, step: int, saved: Saved, *, paused_s: float, write_s: float) -> None:
        self._failures = 0
        self._saved_step = step
        self._send(CheckpointSaved(step, saved.where, saved.bytes, paused_s, write_s))
        try:
            if self._hosts.first:
                self._prune()
        except OSError as error:
            self._send(Notice("warning", f"an old checkpoint could not be removed: {error}"))

    def _prune(self) -> None:
        config = self._config
        for step in self._storage.steps()[config.keep :]:
            if not (config.keep_every_steps and step % config.keep_every_steps == 0):
                self._storage.remove(folder_name(step))

    def _failed(self, step: int, error: OSError) -> None:
        if self._hosts.first:
            with contextlib.suppress(OSError):
                self._storage.clean()
        self._failures += 1
        limit = self._config.failures
        told = f"the checkpoint of step {step} could not be written: {error}"
        if self._failures >= limit:
            self._error = CheckpointError(
                f"{told}; that was failure {self._failures} in a row of the {limit} that "
                "checkpoint.failures allows"
            )
            return
        left = f"failure {self._failures} of {limit}"
        self._send(Notice("warning", f"{told}; training goes on, and saving is retried ({left})"))


def _check_finite(snapshot: Snapshot) -> None:
    """A state that is lost already must not take the place of a good one."""
    for name, tensor in snapshot.tensors.items():
        if not name.startswith("params/"):
            continue
        # Whole numbers are finite; a host may hold no piece of a tensor.
        if not all(bool(torch.isfinite(piece.values).all()) for piece in tensor.pieces):
            raise NonFiniteError(
                f"parameters must be finite numbers; {name.partition('/')[2]} was not after "
                f"step {snapshot.step}, which is therefore not saved"
            )
