"""Steps to trace: a model, the shape of its batch, an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from runner.backends.base import Recipe
from runner.backends.sharding import Sharding
from runner.config.parallel import Mesh
from runner.preflight.hlo import Module
from runner.preflight.tpu_compiler import Port, Source, hlo_text, stablehlo
from runner.preflight.trace import TracedStep, trace

Optim = Callable[[nn.Module], torch.optim.Optimizer]

#: What is cut is an argument of its own; on one chip small ones lie side by side.
TWO_CHIPS = Sharding(Mesh({"fsdp": 2}))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def recipe(build: Callable[[], nn.Module], make_optimizer: Optim = sgd) -> Recipe:
    """A step that pushes the mean of the model's output down, its model without data."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = model(batch["x"])
        return output.float().mean()

    def evaluate(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    with torch.device("meta"):
        model = build()
    return Recipe(model, loss, evaluate, make_optimizer)


def traced(build: Callable[[], nn.Module], *shape: int, make_optimizer: Optim = sgd) -> TracedStep:
    """The traced step of a model on a batch of a shape, cut over two chips."""
    made, batch = recipe(build, make_optimizer), {"x": torch.empty(shape, device="meta")}
    return trace(made, batch, sharding=TWO_CHIPS)


def program(step: TracedStep) -> str:
    """A step for one chip as StableHLO, its operations unnamed."""
    arguments = [Port(argument.name, donated=argument.donated) for argument in step.arguments]
    results = [Port(name) for name in step.results]
    return stablehlo(Source(step.hlo, arguments, results, labels=lambda name: None))


def module(step: TracedStep) -> Module:
    """A step before optimization."""
    return Module(hlo_text(step.hlo))
