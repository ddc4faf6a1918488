"""A job that goes wrong in the way that its setting `fault` names, on a tiny problem."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.base import Arrays, Batch, DataError, DataRequest, Dataset, Job

FAULT_AT_STEP = 3


class Numbers:
    """Points on a line; reading one may fail."""

    def __init__(self, count: int, broken_from: int | None = None) -> None:
        self._count = count
        self._broken_from = broken_from
        self._calls = 0

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Any, *, rng: np.random.Generator | None) -> Arrays:
        self._calls += 1
        if self._broken_from is not None and self._calls > self._broken_from:
            raise DataError("numbers.txt is broken")
        x = (indices / self._count).astype(np.float32)[:, None]
        return {"x": x, "y": 2.0 * x}


def numbers(request: DataRequest) -> Dataset:
    broken_from = request.options["broken_from"]
    return Dataset(train=Numbers(64, broken_from), heldout=Numbers(10), facts={})


class Faulty(Job):
    """Linear regression with a fault."""

    def build(self) -> nn.Module:
        self._step = 0
        if self.settings["fault"] == "build":
            raise KeyError("no such layer")
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self._step += 1
        if self._step == FAULT_AT_STEP:
            self._go_wrong()
        time.sleep(self.settings["step_s"])
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        if self.settings["fault"] == "nan" and self._step >= FAULT_AT_STEP:
            loss = loss * float("nan")
        return loss

    def _go_wrong(self) -> None:
        fault = self.settings["fault"]
        if fault == "raise":
            raise RuntimeError("the job's own error")
        if fault == "exit":
            os._exit(3)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "print":
            print("hello from the job [bold]not markup[/bold]")

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"error": (model(batch["x"]) - batch["y"]).abs().squeeze(1)}


def scale(tensor: torch.Tensor) -> torch.Tensor:
    """Something that is no job, for entries that name the wrong thing."""
    return tensor
