"""What the XLA runtime counted: compiles, their seconds, programs started.

Read by difference: the dynamo bridge clears torch_xla's counters while it extracts a graph,
metrics survive. `ExecuteTime` samples arrive late and are of no use for counting.
"""

from __future__ import annotations

from runner.xla.binding import binding


def compiles() -> tuple[int, float]:
    """XLA compiles so far in this process, and their seconds."""
    data = binding._xla_metric_data("CompileTime")
    return (int(data[0]), data[1] / 1e9) if data else (0, 0.0)


def programs() -> int:
    """Device programs handed over so far: those of the bridge, and lazy graphs.

    A lazy graph is looked up in the compile cache when it is handed over, and counts as
    executed only later, in another thread: so the look-ups are counted.
    """
    bridge = binding._xla_metric_data("RunCachedGraphInputData")
    lazy = (binding._xla_counter_value(name) or 0 for name in ("CachedCompile", "UncachedCompile"))
    return (int(bridge[0]) if bridge else 0) + sum(lazy)


def blocking_syncs() -> int:
    """Times that the bridge had to stop and materialize an input before a program."""
    return int(binding._xla_counter_value("DynamoSyncInputExecuteTime") or 0)
