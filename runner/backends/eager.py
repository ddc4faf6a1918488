"""Plain PyTorch on the host: the reference that the other backends are checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from runner.backends.base import Batch, Metrics, Recipe
from runner.backends.compiles import CompileLog
from runner.backends.inplace import InPlaceBackend


class Eager(InPlaceBackend):
    """No XLA, no compile, no device."""

    def __init__(self, recipe: Recipe, *, log: CompileLog) -> None:
        super().__init__(recipe, log=log, device=torch.device("cpu"))

    def place(self, batch: Batch) -> dict[str, Tensor]:
        """The batch as it is."""
        return dict(batch)

    def train_step(self, batch: Batch, *, step: int, lr: float) -> Metrics:
        """See `Backend.train_step`."""
        torch.manual_seed(self.recipe.step_seed(step))
        self.model.train()
        return self.update(self.forward, batch, lr=lr)

    @torch.no_grad()
    def eval_step(self, batch: Batch, mask: Tensor) -> Metrics:
        """See `Backend.eval_step`."""
        self.model.eval()
        return self.metrics(batch, mask)
