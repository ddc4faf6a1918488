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
    """Device programs started so far: cached graphs (bridge) and lazy executions."""
    cached = binding._xla_metric_data("RunCachedGraphInputData")
    lazy = binding._xla_counter_value("ExecuteComputation")
    return (int(cached[0]) if cached else 0) + int(lazy or 0)


def blocking_syncs() -> int:
    """Times that the bridge had to stop and materialize an input before a program."""
    return int(binding._xla_counter_value("DynamoSyncInputExecuteTime") or 0)
