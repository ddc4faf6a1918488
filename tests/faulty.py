"""A job that goes wrong in the way that its setting `fault` names, on a tiny problem.

Settings: `fault`; `at`, the call of `loss` in a process at which it goes wrong; `times`, how
often in all processes together, counted in the file `memory` (null: every time); `step_s`, how
long a step takes at least.
"""

from __future__ import annotations

import os
import pathlib
import resource
import signal
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.base import Arrays, Batch, DataError, DataRequest, Dataset, Job

#: Bytes that a file may have while the fault "disk" lasts.
FILE_LIMIT = 100


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
        fault = self.settings["fault"]
        if self._step == self.settings["at"] and fault != "none" and self._again():
            getattr(self, f"_{fault}")()
        if fault == "disk" and self._step == self.settings["at"] + 3:
            _limit(resource.RLIMIT_FSIZE, None)
        time.sleep(self.settings["step_s"])
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        if self._step < self.settings["at"]:
            return loss
        if fault == "storm":  # another shape in every step
            loss = model(batch["x"].repeat(self._step, 1)).square().mean()
        if fault == "nan":
            loss = loss * float("nan")
        if fault == "device_memory":  # more than any device has, in one array
            column = loss * torch.ones(1 << 22, 1, device=loss.device)
            loss = (column @ column.t()).sin().mean()
        if fault == "compile":  # some seconds of work for the compiler
            square = loss * torch.ones(8, 8, device=loss.device)
            for number in range(300):
                square = torch.sin(square @ square.roll(number % 8, 1))
            loss = loss + 0.0 * square.mean()
        return loss

    def _again(self) -> bool:
        """Whether the fault is still to happen; counts it."""
        times = self.settings["times"]
        if times is None:
            return True
        memory = pathlib.Path(self.settings["memory"])
        happened = len(memory.read_text()) if memory.exists() else 0
        if happened < times:
            memory.write_text("x" * (happened + 1))
        return happened < times

    def _nan(self) -> None:
        """See `loss`."""

    def _raise(self) -> None:
        raise RuntimeError("the job's own error")

    def _busy(self) -> None:
        raise RuntimeError("TPU initialization failed: /dev/vfio/0: Device or resource busy")

    def _exit(self) -> None:
        os._exit(3)

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _preempt(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _print(self) -> None:
        print("hello from the job [bold]not markup[/bold]")

    def _hang(self) -> None:
        time.sleep(600)

    def _disk(self) -> None:
        """For three steps no file may grow beyond a few bytes, as on a full disk."""
        _limit(resource.RLIMIT_FSIZE, FILE_LIMIT)

    def _full(self) -> None:
        """No file may grow from now on."""
        _limit(resource.RLIMIT_FSIZE, FILE_LIMIT)

    def _memory(self) -> None:
        """Ask for more memory than the process may have."""
        _limit(resource.RLIMIT_AS, 1 << 40)
        torch.zeros(1 << 39)

    def _device_memory(self) -> None:
        """See `loss`."""

    def _compile(self) -> None:
        """See `loss`."""

    def _storm(self) -> None:
        """See `loss`."""

    def _starve(self) -> None:
        """Ask for more memory than the control group has: the kernel kills the process."""
        group = pathlib.Path(os.environ["TEST_MEMORY_GROUP"])
        (group / "cgroup.procs").write_text(str(os.getpid()))
        block = b"x" * (1 << 30)
        print(len(block))

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"error": (model(batch["x"]) - batch["y"]).abs().squeeze(1)}


def _limit(kind: int, soft: int | None) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (hard if soft is None else soft, hard))


def scale(tensor: torch.Tensor) -> torch.Tensor:
    """Something that is no job, for entries that name the wrong thing."""
    return tensor
