"""A pod slice played on one machine: several hosts, each with all devices of the mesh.

What can't be had here is a mesh that spans processes. So every host runs the whole program on
devices of its own, and this module stands in for the wires between them: a batch's rows are
passed around among the hosts before they are placed, and of what the devices hold a host sees its
own devices' pieces only. All else is the runner's own. A job's module calls `play` on import.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from runner.backends.placement import OnMesh
from runner.train.hosts import Peers
from runner.xla import mesh


class _Binding:
    """torch_xla's binding as a host of a pod has it."""

    def __init__(self, real: Any, own: range) -> None:
        self._real, self._own = real, own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _xla_get_runtime_devices(self) -> list[str]:
        names: list[str] = self._real._xla_get_runtime_devices()
        return [names[device] for device in self._own]

    def _get_local_shards(self, tensors: list[Tensor]) -> list[list[Any]]:
        return [self._mine(found) for found in self._real._get_local_shards(tensors)]

    def _get_local_shard_replica_and_indices(self, tensors: list[Tensor]) -> list[list[Any]]:
        found = self._real._get_local_shard_replica_and_indices(tensors)
        return [self._mine(each) for each in found]

    def _mine(self, of_all: list[Any]) -> list[Any]:
        return [of_all[device] for device in self._own]


def play() -> None:
    """Make this process a host of a pod, if it has met others."""
    peers = next((each for each in gc.get_objects() if type(each) is Peers), None)
    if peers is None:
        return
    devices = mesh.device_count()
    share = devices // peers.count
    own = range(peers.index * share, (peers.index + 1) * share)
    mesh.binding = _Binding(mesh.binding, own)
    mesh.process_count = lambda: peers.count
    groups = {name: _group(name, peers) for name in ("prefetch", "MainThread")}
    place = OnMesh.place

    def place_together(self: OnMesh, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = self._sharding.mesh.batch_parts
        mine = self._sharding.mesh.batch_parts_on(own)
        group = groups[threading.current_thread().name]
        together = {}
        for name in sorted(batch):
            sent = torch.zeros_like(batch[name])
            size = len(sent) // parts
            for part in mine:
                rows = slice(part * size, (part + 1) * size)
                sent[rows] = batch[name][rows]
            group.allreduce([sent]).wait()
            together[name] = sent
        return place(self, {name: together[name] for name in batch})

    OnMesh.place = place_together  # type: ignore[method-assign]


def _group(name: str, peers: Peers) -> Any:
    return ProcessGroupGloo(PrefixStore(f"pod/{name}", peers._store), peers.index, peers.count)
