"""Small training problems that every backend must solve alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.backends.base import Backend, Recipe
from runner.backends.registry import build
from runner.backends.state import TrainState
from runner.record.events import GraphRecord

Optim = Callable[[nn.Module], torch.optim.Optimizer]


class TiedNet(nn.Module):
    """Convolutions, batch normalisation, a frozen layer, tied weights, a buffer of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 8, 9, padding=4)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(32, 32)
        self.again = nn.Linear(32, 32)
        self.again.weight = self.hidden.weight
        self.frozen = nn.Linear(32, 32)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(32, 10)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.wide(F.relu(self.norm(self.conv(images))))
        features = F.adaptive_avg_pool2d(maps, 2).flatten(1) * self.scale
        features = self.dropout(self.again(F.relu(self.hidden(features))))
        return self.head(F.relu(self.frozen(features)))


def recipe(make_optimizer: Optim | None = None, *, dropout: float = 0.0, **changes: Any) -> Recipe:
    """A recipe for `TiedNet` with weights from a fixed seed."""
    torch.manual_seed(7)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["image"]), batch["label"])

    def evaluate(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        logits = model(batch["image"])
        return {"accuracy": (logits.argmax(1) == batch["label"]).float()}

    return Recipe(
        model=TiedNet(dropout),
        loss=loss,
        evaluate=evaluate,
        make_optimizer=make_optimizer or sgd,
        **changes,
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 2.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def batch(number: int, size: int = 8) -> dict[str, Tensor]:
    """The batch of a number, always the same."""
    generator = torch.Generator().manual_seed(1000 + number)
    return {
        "image": torch.randn(size, 3, 8, 8, generator=generator),
        "label": torch.randint(0, 10, (size,), generator=generator),
    }


def start(
    name: str, work: Recipe, *, records: list[GraphRecord] | None = None, strict: bool = False
) -> Backend:
    """The named backend at work on a recipe."""
    kept: list[GraphRecord] = [] if records is None else records
    return build(name, work, on_start=lambda role: None, on_record=kept.append, strict=strict)


def losses(backend: Backend, steps: int = 5, *, lr: float = 0.01, first: int = 0) -> list[float]:
    """Losses of some steps, the learning rate another one in each."""
    values = []
    for step in range(first, first + steps):
        metrics = backend.train_step(backend.place(batch(step)), step=step, lr=lr / (step + 1))
        values.append(metrics["loss"].item())
    return values


def host(tensors: Any) -> dict[str, Tensor]:
    """Named tensors as copies on the host."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def saved(state: TrainState) -> TrainState:
    """A state as it would come back from a checkpoint."""
    return TrainState(
        host(state.params), host(state.buffers), host(state.optimizer), step=state.step
    )
