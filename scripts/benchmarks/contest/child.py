"""One contestant in a process of its own: takes requests on stdin, answers with figures.

A request and its answer are a JSON object each, on one line. Between requests nothing runs, so
that contestants can be stepped in turns.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from contest.roster import BOUND, create

Reply = dict[str, Any]
WARM_UPDATES = 10


class Timing:
    """Holds a clock to a contestant."""

    def __init__(self, model: str, name: str) -> None:
        self._clock: Any = None
        if name in BOUND:
            from contest.binding import BindingClock

            self._clock = BindingClock()
        self._one = create(model, name)
        self._losses: list[float] = []
        self._warm_compiles = 0

    def first(self) -> Reply:
        """The first call, from weights on the host to its loss read."""
        begun = time.perf_counter()
        self._one.start()
        self._losses = self._one.losses(self._one.call())
        seconds = time.perf_counter() - begun
        return {"first_step_s": seconds, "first_compile_s": self._one.compiles()[1]}

    def warm(self) -> Reply:
        """Calls until nothing compiles any more, one at least."""
        losses = self._losses + self._one.losses(self._one.call())
        while len(losses) < WARM_UPDATES:
            losses += self._one.losses(self._one.call())
        self._warm_compiles, compile_s = self._one.compiles()
        return {
            "compile_s": compile_s,
            "losses": losses[:WARM_UPDATES],
            "parameters": self._one.parameters,
        }

    def burst(self, steps: int) -> Reply:
        """Updates without waiting in between, one wait at the end."""
        one = self._one
        one.call()
        one.wait()
        one.ended()
        programs = one.programs()
        calls = max(1, steps // one.updates)
        begun = time.perf_counter()
        for _ in range(calls):
            one.call()
        one.wait()
        seconds = time.perf_counter() - begun
        updates = calls * one.updates
        return {
            "step_ms": 1e3 * seconds / updates,
            "programs_per_step": (one.programs() - programs) / updates,
        }

    def probe(self, calls: int) -> Reply:
        """Single calls on an idle device, and what the binding takes of them."""
        calls = max(1, calls // self._one.updates)
        if self._clock is None:
            return self._single_calls(calls)
        with self._clock.armed(waits=False) as timed:
            figures = self._single_calls(calls)
        with self._clock.armed(waits=True) as waited:
            self._single_calls(calls)
        scale = 1e3 / self._one.updates
        return {
            **figures,
            "binding_ms": [scale * seconds for seconds in timed.call_s],
            "program_ms": [scale * seconds for seconds in waited.done_s],
            "arguments": waited.arguments,
        }

    def _single_calls(self, calls: int) -> Reply:
        """Until they return, until they are done, and what is left to do after that."""
        figures: dict[str, list[float]] = {"host_ms": [], "waited_ms": [], "after_ms": []}
        scale = 1e3 / self._one.updates
        for _ in range(calls):
            self._one.wait()
            begun = time.perf_counter()
            self._one.call()
            returned = time.perf_counter()
            self._one.wait()
            ended = time.perf_counter()
            self._one.ended()
            after = time.perf_counter()
            spans = (returned - begun, ended - begun, after - ended)
            for values, seconds in zip(figures.values(), spans, strict=True):
                values.append(scale * seconds)
        return figures

    def facts(self) -> Reply:
        """What is counted, at the end."""
        count, seconds = self._one.compiles()
        held, source = self._one.memory()
        return {
            "compiles": count,
            "recompiles": count - self._warm_compiles,
            "compile_s": seconds,
            "device_bytes": held,
            "device_bytes_source": source,
        }


def main() -> None:
    """Answer requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What libraries print must not come between the answers.
    os.dup2(2, 1)
    timing = Timing(sys.argv[1], sys.argv[2])
    replies.write("{}\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(timing, request.pop("do"))(**request)
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
