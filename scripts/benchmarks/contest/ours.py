"""This repository's backends as contestants, through `runner.backends.registry` alone."""

from __future__ import annotations

import importlib

import torch

from contest import models
from contest.contestant import Contestant
from runner.backends import registry
from runner.backends.base import Backend, Metrics, Recipe


class Ours(Contestant):
    """A backend of the registry.

    Args:
        model: The model's name.
        backend: The backend's name.
        updates: `steps_per_call`.
    """

    def __init__(self, model: str, backend: str, *, updates: int = 1) -> None:
        super().__init__()
        self.updates = updates
        self._name = backend
        # Imports and the device are no part of a first step; autograd's engine, besides, must
        # know the device before it first runs.
        importlib.import_module(registry.BACKENDS[backend].partition(":")[0])
        if backend != "eager":
            importlib.import_module("torch._dynamo")
            importlib.import_module("runner.xla.device").open_device()
        self._entry, self._module, self._host = models.make(model)
        self.parameters = models.parameter_count(self._module)
        self._backend: Backend
        self._calls: list[list[dict[str, torch.Tensor]]] = []
        self._updated = 0

    def start(self) -> None:
        """See `Contestant.start`."""
        recipe = Recipe(
            model=self._module,
            loss=models.loss,
            evaluate=lambda module, batch: {},
            make_optimizer=self._entry.optimizer,
        )
        self._backend = registry.build(
            self._name,
            recipe,
            on_start=lambda role: None,
            on_record=lambda record: None,
            strict=False,
            steps_per_call=self.updates,
        )
        batches = [self._backend.place(batch) for batch in self._host]
        count = len(batches)
        self._calls = [
            [batches[(first + k) % count] for k in range(self.updates)] for first in range(count)
        ]

    def call(self) -> Metrics:
        """See `Contestant.call`."""
        step = next(self.counter) * self.updates
        self._updated = step + self.updates
        # Another rate in every update, as a schedule gives; float32 sees no difference.
        lr = self._entry.lr * (1 + 1e-12 * (step % 1000))
        batches = self._calls[step % len(self._calls)]
        return self._backend.train_steps(batches, step=step, lrs=[lr] * self.updates)

    def losses(self, made: Metrics) -> list[float]:
        """See `Contestant.losses`."""
        losses: list[float] = made["loss"].cpu().reshape(-1).tolist()
        return losses

    def wait(self) -> None:
        """See `Contestant.wait`."""
        if self._name != "eager":
            from runner.xla import device

            device.wait()

    def ended(self) -> None:
        """See `Contestant.ended`: what `StepClock` calls."""
        self._backend.ended(self._updated)

    def compiles(self) -> tuple[int, float]:
        """See `Contestant.compiles`."""
        return self._backend.compile_totals()

    def programs(self) -> int:
        """See `Contestant.programs`."""
        return self._backend.programs()

    def memory(self) -> tuple[int, str]:
        """See `Contestant.memory`."""
        held = self._backend.memory_bytes()
        return held, "state" if held == self._backend.state(0).bytes() else "runtime"
