"""Whether and when a run is tried again: a budget for each kind of fault."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from runner.config.schema import RetriesConfig
from runner.record.errors import Fault
from runner.record.outcome import Attempt

_LONGEST_WAIT_S = 60.0
#: Tries after the host ran out of memory: another process may have needed it.
_HOST_MEMORY_RETRIES = 1
#: Attempts in a row that a checkpoint may begin and not survive.
_DEATHS = 2
_DEADLY = (Fault.FAILURE, Fault.HOST_MEMORY)


class Budgets:
    """Counts faults; every budget is full again once a later step than ever was saved.

    Args:
        config: How large the budgets are.
        saved_step: The newest checkpoint that there is.
    """

    def __init__(self, config: RetriesConfig, *, saved_step: int) -> None:
        self._backoff_s = config.backoff_s
        self._saved_step = saved_step
        self._used: collections.Counter[Fault] = collections.Counter()
        self._allowed: dict[Fault, int | None] = {
            Fault.FAILURE: config.failures,
            Fault.PREEMPTION: config.preemptions,
            Fault.INFRASTRUCTURE: config.infrastructure,
            Fault.HOST_MEMORY: _HOST_MEMORY_RETRIES,
        }

    def wait_s(self, attempt: Attempt) -> float | None:
        """Seconds to wait before the next attempt, or None if there is to be none."""
        if attempt.saved_step > self._saved_step:
            self._saved_step = attempt.saved_step
            self._used.clear()
        fault = attempt.fault
        if fault not in self._allowed:
            return None
        self._used[fault] += 1
        allowed = self._allowed[fault]
        if allowed is not None and self._used[fault] > allowed:
            return None
        if fault is Fault.PREEMPTION:
            return 0.0
        return float(min(_LONGEST_WAIT_S, self._backoff_s * 2 ** (self._used.total() - 1)))

    def left(self, fault: Fault) -> str:
        """What is left of a budget, in words."""
        allowed = self._allowed[fault]
        return "no limit" if allowed is None else f"{allowed - self._used[fault]} more"


def is_deadly(attempts: Sequence[Attempt], *, step: int) -> bool:
    """Whether the last attempts began at the checkpoint of `step` and came no further.

    One may be chance; after two the checkpoint may be to blame, though its bytes are right.
    """
    last = attempts[-_DEATHS:]
    return len(last) == _DEATHS and all(
        attempt.first_step == step and attempt.saved_step <= step and attempt.fault in _DEADLY
        for attempt in last
    )
