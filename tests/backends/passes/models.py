"""Small models with everything that the passes look for, and one update of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.backends.base import Backend, Recipe
from runner.backends.registry import build
from runner.backends.state import view
from runner.config.schema import PassesConfig
from runner.record.events import GraphRecord

BATCH, TOKENS, WIDTH, VOCABULARY, CLASSES = 4, 16, 32, 50, 10


class Transformer(nn.Module):
    """A causal pre-norm transformer with learned positions, its head tied."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.5 * torch.randn(TOKENS, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return F.linear(self.norms[2](x), self.token.weight)


class Convolutional(nn.Module):
    """Convolutions, batch and group norm, in-place activations, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.batch = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.group = nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.batch(self.stem(images)), inplace=True), 2)
        x = x + F.relu(self.group(self.wide(x)), inplace=True)
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """Two residual blocks with batch norm; nothing in it chooses, as max pooling does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.start = nn.BatchNorm2d(16)
        self.kernels = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.start(self.stem(images))), 2)
        for block in (0, 2):
            y = F.relu(self.norms[block](self.kernels[block](x)))
            x = F.relu(x + self.norms[block + 1](self.kernels[block + 1](y)))
        return self.head(x.mean((2, 3)))


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits = model(batch["input"]).float()
    return F.cross_entropy(logits.flatten(0, -2), batch["target"].flatten(), label_smoothing=0.1)


def _evaluate(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"largest": model(batch["input"]).float().flatten(1).amax(1)}


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def problem(make: type[nn.Module], seed: int = 3) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with its weights, and a batch; for a seed always the same."""
    torch.manual_seed(seed)
    model = make()
    if make is Transformer:
        tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS + 1))
        return model, {"input": tokens[:, :-1].contiguous(), "target": tokens[:, 1:].contiguous()}
    images = torch.randn(BATCH, 3, 16, 16)
    return model, {"input": images, "target": torch.randint(0, CLASSES, (BATCH,))}


@dataclasses.dataclass(frozen=True)
class Update:
    """Loss and gradients of a step, and its graph."""

    loss: float
    gradients: dict[str, Tensor]
    graph: GraphRecord


Started = tuple[Backend, dict[str, Tensor], list[GraphRecord]]


def recipe_of(model: nn.Module, passes: PassesConfig, autocast: torch.dtype | None) -> Recipe:
    """A step by plain SGD with a rate of 1."""
    return Recipe(model, _loss, _evaluate, _sgd, autocast=autocast, passes=passes)


def started(
    make: type[nn.Module], passes: PassesConfig, autocast: torch.dtype | None, seed: int = 3
) -> Started:
    """`openxla_step` at work on a model, a batch on the host, and where its graphs go."""
    model, batch = problem(make, seed)
    records: list[GraphRecord] = []
    recipe = recipe_of(model, passes, autocast)
    backend = build(
        "openxla_step", recipe, on_start=lambda _: None, on_record=records.append, strict=False
    )
    return backend, batch, records


def updates(
    make: type[nn.Module],
    passes: PassesConfig,
    autocast: torch.dtype | None,
    seeds: Sequence[int],
) -> list[Update]:
    """One update of each problem, all by one program."""
    backend, _, records = started(make, passes, autocast, seeds[0])
    found = []
    for seed in seeds:
        model, batch = problem(make, seed)
        backend.load(view(model, _sgd(model), step=0))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        loss = backend.train_step(backend.place(batch), step=0, lr=1.0)["loss"].item()
        after = backend.state(1).params
        gradients = {name: value - after[name] for name, value in before.items()}
        found.append(Update(loss, gradients, records[0]))
    assert len(records) == 1
    return found


def update(make: type[nn.Module], passes: PassesConfig, autocast: torch.dtype | None) -> Update:
    """One update of the problem of seed 3."""
    return updates(make, passes, autocast, [3])[0]


def largest(make: type[nn.Module], passes: PassesConfig) -> tuple[float, GraphRecord]:
    """The held-out metric in bf16, and its graph."""
    backend, batch, records = started(make, passes, torch.bfloat16)
    placed = backend.place({**batch, "mask": torch.ones(BATCH)})
    mask = placed.pop("mask")
    return backend.eval_step(placed, mask)["largest"].item(), records[0]


def reference(make: type[nn.Module], seed: int = 3) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in float64, by plain PyTorch."""
    model, batch = problem(make, seed)
    model = copy.deepcopy(model).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    logits = model(batch["input"])
    flat, target = logits.flatten(0, -2), batch["target"].flatten()
    loss = F.cross_entropy(flat, target, label_smoothing=0.1)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()))
    return loss.item(), dict(zip(named, grads, strict=True))
