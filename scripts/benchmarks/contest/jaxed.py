"""The twins in JAX as a contestant: one jitted call a step, its state donated."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from contest.contestant import Contestant

try:
    import jax

    from contest import twins
except ImportError as error:
    raise ImportError(
        f"the jax rows need jax and optax, which need CPython >= 3.11; this is "
        f"{sys.version.split()[0]}: {error}"
    ) from error

COMPILED = "/jax/core/compile/backend_compile_duration"


class Jax(Contestant):
    """A twin with weights and batches from the file that `contest.models` wrote."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._seconds: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        self._device = jax.devices()[0]
        self._twin = twins.TWINS[model]
        with np.load(os.environ["CONTEST_WEIGHTS"]) as arrays:
            host = dict(arrays)
        self._params: Any = twins.converted(host, "parameter")
        self._buffers: Any = twins.converted(host, "buffer")
        count = len({name.split("/")[1] for name in host if name.startswith("batch/")})
        self._batches: list[Any] = [twins.converted(host, f"batch/{i}") for i in range(count)]
        self.parameters = sum(value.size for value in self._params.values())
        self._state: Any = None
        self._step: Any = None
        self._started = 0

    def start(self) -> None:
        """See `Contestant.start`."""
        optimizer = self._twin.optimizer()
        self._params = jax.device_put(self._params)
        self._buffers = jax.device_put(self._buffers)
        self._batches = [jax.device_put(batch) for batch in self._batches]
        self._state = jax.jit(optimizer.init)(self._params)
        self._step = twins.train_step(self._twin, optimizer)

    def call(self) -> tuple[jax.Array, jax.Array]:
        """See `Contestant.call`."""
        batch = self._batches[next(self.counter) % len(self._batches)]
        self._params, self._buffers, self._state, metrics = self._step(
            self._params, self._buffers, self._state, batch
        )
        self._started += 1
        made: tuple[jax.Array, jax.Array] = metrics
        return made

    def losses(self, made: tuple[jax.Array, jax.Array]) -> list[float]:
        """See `Contestant.losses`."""
        return [float(made[0])]

    def wait(self) -> None:
        """See `Contestant.wait`."""
        jax.block_until_ready(  # type: ignore[no-untyped-call]
            (self._params, self._buffers, self._state)
        )

    def compiles(self) -> tuple[int, float]:
        """See `Contestant.compiles`."""
        return len(self._seconds), sum(self._seconds)

    def programs(self) -> int:
        """Calls of the jitted step: each is one program, by construction."""
        return self._started

    def memory(self) -> tuple[int, str]:
        """See `Contestant.memory`."""
        told = self._device.memory_stats()
        if told:
            return int(told["bytes_in_use"]), "runtime"
        leaves = jax.tree.leaves((self._params, self._buffers, self._state))
        return sum(leaf.nbytes for leaf in leaves), "state"

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            self._seconds.append(duration_secs)
