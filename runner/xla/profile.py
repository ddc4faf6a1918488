"""Traces of the runtime, for TensorBoard's profile plugin."""

from __future__ import annotations

import contextlib
import pathlib

from torch_xla.debug import profiler

from runner.xla.binding import binding


class Trace:
    """A trace that begins at once; a process can have one at a time.

    Args:
        folder: The TensorBoard folder; the trace goes into `plugins/profile/<time>/` in it.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        profiler.start_trace(folder)

    def step(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Marks what the host does meanwhile as an update.

        torch_xla's own `StepTrace` also cuts the lazy graph at its end; this only marks.
        """
        mark: contextlib.AbstractContextManager[None] = binding.profiler.TraceMe(
            "train", step_num=step, _r=1
        )
        return mark

    def stop(self) -> None:
        """Ends the trace and writes it."""
        profiler.stop_trace()
