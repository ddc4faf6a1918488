"""Ray clusters of several nodes on this machine: real raylets, a process tree each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import psutil
from ray.cluster_utils import Cluster

#: A node's share of memory for objects, which jobs have none of.
_STORE_BYTES = 80 * 2**20
#: Milliseconds: a lost node is noticed in a second or two instead of half a minute.
_QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


@contextlib.contextmanager
def cluster(*nodes: dict[str, Any]) -> Iterator[Cluster]:
    """A cluster whose head takes no jobs, and a node for each dictionary of its resources."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _QUICK}
    made = Cluster(
        initialize_head=True, head_node_args={**head, "object_store_memory": _STORE_BYTES}
    )
    try:
        for node in nodes:
            made.add_node(object_store_memory=_STORE_BYTES, wait=False, **node)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


def kill_node_of(made: Cluster, pid: int) -> None:
    """Kill the raylet under which a process runs, as if its machine had lost power."""
    raylets = {parent.pid for parent in psutil.Process(pid).parents()}
    for node in made.worker_nodes:
        raylet = node.all_processes["raylet"][0].process
        if raylet.pid in raylets:
            raylet.kill()
            raylet.wait(timeout=30)
            return
    raise AssertionError(f"process {pid} runs on no node")
