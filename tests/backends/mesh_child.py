"""Trains a ResNet and a GPT over some devices: `python -m tests.backends.mesh_child DEVICES FILE`.

How many devices there are is settled when XLA starts, so each number has a process of its own.
What was seen is written as JSON, case by case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from jobs.base import Job
from jobs.gpt import GPTJob
from jobs.resnet import ResNet
from runner.backends.base import Backend, Recipe
from runner.backends.openxla_step import OpenXlaStep
from runner.backends.registry import build
from runner.backends.sharding import Sharding
from runner.backends.state import TrainState
from runner.config.parallel import Mesh
from runner.record.events import GraphRecord
from runner.xla.mesh import held_bytes

STEPS = 20
BATCH = 16
#: Small-batch BatchNorm amplifies the rounding of sums that are taken in another order, and the
#: amplified part reaches the next losses through the weights: ten times the rate, ten times the
#: distance (5e-5 after 20 updates at 1e-4). At this one losses still fall hundreds of tolerances.
RESNET_RATE = 1e-5
#: Batches that come again and again, so that losses fall.
BATCHES = 4


class ShortResNet(ResNet):
    """ResNet-18 without its last stage, whose three quarters of the parameters take the time."""

    def build(self) -> nn.Module:
        model = super().build()
        model.layer4, model.fc = nn.Identity(), nn.Linear(256, 10)
        return model


def resnet() -> Job:
    settings = {"depth": 18, "stem": "small", "zero_init_residual": False, "label_smoothing": 0.0}
    return ShortResNet(settings, {"classes": 10, "channels": 3, "image_size": 16})


def gpt() -> Job:
    settings = {"depth": 2, "width": 64, "heads": 4, "dropout": 0.0, "positions": "rotary"}
    facts = {"vocabulary": 64, "seq_len": 32, "heldout_tokens": 100, "heldout_bytes": 400}
    return GPTJob(settings, facts)


def images(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "image": torch.randn(BATCH, 3, 16, 16, generator=generator),
        "label": torch.randint(10, (BATCH,), generator=generator),
    }


def tokens(generator: torch.Generator) -> dict[str, torch.Tensor]:
    text = torch.randint(64, (BATCH, 33), generator=generator)
    return {"tokens": text[:, :-1].contiguous(), "target": text[:, 1:].contiguous()}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, on which batches, by which optimizer at which rate."""

    job: Callable[[], Job]
    batch: Callable[[torch.Generator], dict[str, torch.Tensor]]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    rate: float
    ways: tuple[str, ...] = ("data", "fsdp")
    remat: bool = False
    scan_layers: bool = False
    backend: str = "openxla_step"


CASES = {
    "resnet": Case(resnet, images, sgd, RESNET_RATE),
    "gpt": Case(gpt, tokens, adamw, 1e-3),
    "gpt-remat": Case(gpt, tokens, adamw, 1e-3, ways=("fsdp",), remat=True),
    "gpt-lazy": Case(gpt, tokens, adamw, 1e-3, backend="lazy"),
    "gpt-scanned": Case(gpt, tokens, adamw, 1e-3, remat=True, scan_layers=True),
}


def started(name: str, mesh: Mesh, records: list[GraphRecord]) -> Backend:
    """The backend at work on a model with weights from a fixed seed."""
    case = CASES[name]
    job = case.job()
    torch.manual_seed(0)
    recipe = Recipe(
        job.build(),
        job.loss,
        job.evaluate,
        case.optimizer,
        remat=case.remat,
        scan_layers=case.scan_layers,
    )
    backend = build(
        case.backend,
        recipe,
        on_start=lambda role: None,
        on_record=records.append,
        strict=True,
        sharding=Sharding(mesh, job.sharding),
    )
    return backend


def train(name: str, way: str, devices: int) -> dict[str, Any]:
    """What is seen of some updates, the same ones for any number of devices."""
    records: list[GraphRecord] = []
    case = CASES[name]
    backend = started(name, Mesh({way: devices} if devices > 1 else {}), records)
    losses, programs, compiles = [], [], []
    for step in range(STEPS):
        batch = backend.place(case.batch(torch.Generator().manual_seed(step % BATCHES)))
        before = backend.programs()
        metrics = backend.train_step(batch, step=step, lr=case.rate)
        losses.append(metrics["loss"].item())
        programs.append(backend.programs() - before)
        compiles.append(backend.compile_totals()[0])
    backend.load(saved(backend))
    loss = backend.train_step(batch, step=STEPS, lr=case.rate)["loss"].item()
    return {
        "resumed": [loss, backend.compile_totals()[0] - compiles[-1]],
        "losses": losses,
        "programs": programs,
        "compiles": compiles,
        "statistics": running_variances(backend),
        "graphs": [record.role for record in records],
        **(state_bytes(backend, devices) if devices > 1 else {}),
    }


def saved(backend: Backend) -> TrainState:
    """The state as it would come back from a checkpoint."""
    groups = {
        group: dict(zip(named, backend.to_host(list(named.values())), strict=True))
        for group, named in backend.state(STEPS).groups().items()
    }
    return TrainState(**groups, step=STEPS)


def running_variances(backend: Backend) -> dict[str, float]:
    """The mean of every BatchNorm's."""
    buffers = backend.state(STEPS).buffers
    return {name: t.mean().item() for name, t in buffers.items() if name.endswith("_var")}


def carried(backend: Backend) -> list[torch.Tensor]:
    """Parameters and optimizer state as they lie on the devices."""
    if not isinstance(backend, OpenXlaStep):
        state = backend.state(STEPS)
        tensors = [*state.params.values(), *state.optimizer.values()]
        return [tensor.detach() for tensor in tensors if tensor.device.type == "xla"]
    kinds, layout = backend._function.carried, backend._layout
    assert layout is not None
    return [
        tensor
        for tensor, positions in zip(backend._carried, layout.held, strict=True)
        if all(kinds[position].group != "buffers" for position in positions)
    ]


def state_bytes(backend: Backend, devices: int) -> dict[str, Any]:
    """Bytes of parameters and optimizer state that can be split: in all, and on each device."""
    divisible = [
        tensor for tensor in carried(backend) if any(size % devices == 0 for size in tensor.shape)
    ]
    return {
        "divisible": sum(tensor.numel() * tensor.element_size() for tensor in divisible),
        "held": held_bytes(divisible),
    }


def main(devices: int, found: pathlib.Path) -> None:
    assert os.environ["CPU_NUM_DEVICES"] == str(devices)
    cases = {
        f"{name} {way}": train(name, way, devices)
        for name, case in CASES.items()
        for way in (case.ways if devices > 1 else case.ways[:1])
    }
    found.write_text(json.dumps(cases))


if __name__ == "__main__":
    main(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
