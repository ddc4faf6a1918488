"""The binding's own call, timed by itself on the arguments that a backend prepared for it.

Stands in for `torch_xla._XLAC._run_cached_graph`, which every compiled program goes through, and
lets all calls pass; only while armed does it hold a clock to the call, and to the program if that
is to be waited for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch_xla
from torch_xla.core import xla_model


@dataclasses.dataclass
class Timed:
    """Calls of the binding, in their order.

    Attributes:
        call_s: Until each returned.
        done_s: Until the program had ended too, where it was waited for.
        arguments: Tensors that the last was handed.
    """

    call_s: list[float] = dataclasses.field(default_factory=list)
    done_s: list[float] = dataclasses.field(default_factory=list)
    arguments: int = 0


class BindingClock:
    """A stand-in for the binding's call; make it before a backend is imported."""

    def __init__(self) -> None:
        binding: Any = torch_xla._XLAC  # type: ignore[attr-defined]
        self._run = binding._run_cached_graph
        self._wait = xla_model.wait_device_ops
        self._armed = self._waits = False
        self._timed = Timed()
        binding._run_cached_graph = self._call

    @contextlib.contextmanager
    def armed(self, *, waits: bool) -> Iterator[Timed]:
        """Times the calls made meanwhile; it fills as they are made.

        Args:
            waits: Whether each waits for its program.
        """
        self._armed, self._waits, self._timed = True, waits, Timed()
        yield self._timed
        self._armed = False

    def _call(self, key: Any, arguments: Sequence[Any]) -> Any:
        if not self._armed:
            return self._run(key, arguments)
        # As little as can be: what the clock takes is counted as the caller's.
        start = time.perf_counter()
        results = self._run(key, arguments)
        self._timed.call_s.append(time.perf_counter() - start)
        if self._waits:
            self._wait()
            self._timed.done_s.append(time.perf_counter() - start)
            self._timed.arguments = len(arguments)
        return results
