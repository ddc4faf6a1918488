"""PyTorch's own `openxla` as a contestant: torch.compile, a lazy optimizer, a sync a step.

Written as PyTorch/XLA's users write it, with nothing of this repository but the model and the
counters. Model and loss are one compiled function, which gives the fewest programs.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch_xla
from torch import Tensor
from torch_xla.core import xla_model

from contest import models
from contest.contestant import Contestant
from runner.xla import counters
from runner.xla.device import memory_bytes


class Stock(Contestant):
    """`torch.compile(backend="openxla")` around model and loss."""

    def __init__(self, model: str) -> None:
        super().__init__()
        importlib.import_module("torch._dynamo")
        self._device = torch_xla.device()
        self._entry, self._module, self._host = models.make(model)
        self.parameters = models.parameter_count(self._module)
        self._optimizer: torch.optim.Optimizer
        self._loss: Any = None
        self._norm: Tensor
        self._batches: list[dict[str, Tensor]] = []

    def start(self) -> None:
        """See `Contestant.start`."""
        device = self._device
        self._module = self._module.to(device)
        self._optimizer = self._entry.optimizer(self._module)
        self._loss = torch.compile(models.loss, backend="openxla")
        self._batches = [
            {name: tensor.to(device) for name, tensor in batch.items()} for batch in self._host
        ]
        torch_xla.sync()

    def call(self) -> Tensor:
        """See `Contestant.call`."""
        batch = self._batches[next(self.counter) % len(self._batches)]
        self._optimizer.zero_grad()
        loss: Tensor = self._loss(self._module, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._norm = self._gradient_norm()
        self._optimizer.step()
        torch_xla.sync()
        return loss.detach()

    def _gradient_norm(self) -> Tensor:
        """What the others return beside the loss."""
        parameters = self._module.parameters()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def losses(self, made: Tensor) -> list[float]:
        """See `Contestant.losses`."""
        return [made.item()]

    def wait(self) -> None:
        """See `Contestant.wait`."""
        torch_xla.sync()
        xla_model.wait_device_ops()

    def compiles(self) -> tuple[int, float]:
        """See `Contestant.compiles`."""
        return counters.compiles()

    def programs(self) -> int:
        """See `Contestant.programs`."""
        return counters.programs()

    def memory(self) -> tuple[int, str]:
        """See `Contestant.memory`."""
        held = memory_bytes(self._device)
        return (self._state_bytes(), "state") if held is None else (held, "runtime")

    def _state_bytes(self) -> int:
        tensors = [*self._module.parameters(), *self._module.buffers()]
        for state in self._optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
