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


@dataclasses.dataclass(frozen=True)
class Timed:
    """One call of the binding.

    Attributes:
        call_s: Until the call returned.
        done_s: Until the program had ended too, where it was waited for.
        arguments: Tensors that were handed over.
    """

    call_s: float
    done_s: float | None
    arguments: int


class BindingClock:
    """A stand-in for the binding's call; make it before a backend is imported."""

    def __init__(self) -> None:
        binding: Any = torch_xla._XLAC  # type: ignore[attr-defined]
        self._run = binding._run_cached_graph
        self._wait = xla_model.wait_device_ops
        self._armed = self._waits = False
        self._timed: list[Timed] = []
        binding._run_cached_graph = self._call

    @contextlib.contextmanager
    def armed(self, *, waits: bool) -> Iterator[list[Timed]]:
        """Times the calls made meanwhile; their list fills as they are made.

        Args:
            waits: Whether each waits for its program.
        """
        self._armed, self._waits, self._timed = True, waits, []
        yield self._timed
        self._armed = False

    def _call(self, key: Any, arguments: Sequence[Any]) -> Any:
        if not self._armed:
            return self._run(key, arguments)
        start = time.perf_counter()
        results = self._run(key, arguments)
        called, done_s = time.perf_counter(), None
        if self._waits:
            self._wait()
            done_s = time.perf_counter() - start
        self._timed.append(Timed(called - start, done_s, len(arguments)))
        return results
