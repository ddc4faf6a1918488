"""torch_xla's lazy tensors: the step is traced anew every time, one sync hands it over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runner.backends.base import Batch, Metrics, Recipe
from runner.backends.compiles import CompileLog
from runner.backends.inplace import InPlaceBackend
from runner.backends.state import TrainState
from runner.xla import counters, device
from runner.xla.program import upload


class XlaInPlaceBackend(InPlaceBackend):
    """What `lazy` and `openxla` share: an XLA device, and a sync at the end of a step."""

    def __init__(self, recipe: Recipe, *, log: CompileLog) -> None:
        super().__init__(recipe, log=log, device=device.open_device())
        device.sync()

    def place(self, batch: Batch) -> dict[str, Tensor]:
        """See `Backend.place`."""
        return device.place(batch, self.device)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Backend.to_host`."""
        copies = device.to_host([tensor.detach() for tensor in tensors])
        # An optimizer keeps its step counters on the host, and counts them up in place.
        return [
            copy.clone() if tensor.device.type == "cpu" else copy
            for tensor, copy in zip(tensors, copies, strict=True)
        ]

    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `InPlaceBackend.upload`; no two share a buffer, which a step would overwrite."""
        return upload(tensors)

    def load(self, state: TrainState) -> None:
        """See `Backend.load`."""
        super().load(state)
        # Left pending, the copies would become a part of the first step's graph.
        device.sync()

    def programs(self) -> int:
        """See `Backend.programs`."""
        return counters.programs()

    @staticmethod
    def compile_totals() -> tuple[int, float]:
        """See `Backend.compile_totals`."""
        return counters.compiles()

    def memory_bytes(self) -> int:
        """See `Backend.memory_bytes`."""
        return device.memory_bytes(self.device) or super().memory_bytes()


class Lazy(XlaInPlaceBackend):
    """Forward, backward and optimizer as one lazy graph."""

    def train_step(self, batch: Batch, *, step: int, lr: float) -> Metrics:
        """See `Backend.train_step`."""
        device.manual_seed(self.recipe.step_seed(step))
        self.model.train()
        with self.log.watch("step", list(batch.values())):
            metrics = self.update(self.forward, batch, lr=lr)
            device.sync()
        self.log.warmed("step")
        return metrics

    @torch.no_grad()
    def eval_step(self, batch: Batch, mask: Tensor) -> Metrics:
        """See `Backend.eval_step`."""
        self.model.eval()
        with self.log.watch("eval", [*batch.values(), mask]):
            metrics = self.metrics(batch, mask)
            device.sync()
        self.log.warmed("eval")
        return metrics
