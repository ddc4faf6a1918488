"""An MLP and a GPT under every usual optimizer: losses, norms, gradients as in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from jobs.base import Job
from jobs.gpt import GPTJob
from jobs.mlp import MLP
from runner.backends.base import Recipe
from tests.backends import problems

Optim = Callable[[nn.Module], torch.optim.Optimizer]
FACTS = {"vocabulary": 16, "seq_len": 8, "heldout_tokens": 8, "heldout_bytes": 8}


def mlp() -> Job:
    facts = {"classes": 10, "channels": 1, "image_size": 4}
    return MLP({"width": 16, "depth": 2, "dropout": 0.0}, facts)


def gpt() -> Job:
    settings = {"depth": 1, "width": 16, "heads": 2, "dropout": 0.0, "positions": "learned"}
    return GPTJob(settings, FACTS)


def images(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "image": torch.randn(8, 1, 4, 4, generator=generator),
        "label": torch.randint(10, (8,), generator=generator),
    }


def text(step: int) -> dict[str, Tensor]:
    stream = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(step))
    return {"tokens": stream[:, :-1].contiguous(), "target": stream[:, 1:].contiguous()}


MODELS = {"mlp": (mlp, images), "gpt": (gpt, text)}
OPTIMIZERS: dict[str, Optim] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1.0),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1.0, foreach=False),
    "adamw_foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1.0, foreach=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1.0),
}


def recipe(model: str, optimizer: str) -> Recipe:
    job = MODELS[model][0]()
    torch.manual_seed(1)
    return Recipe(
        model=job.build(),
        loss=job.loss,
        evaluate=job.evaluate,
        make_optimizer=OPTIMIZERS[optimizer],
    )


@functools.cache
def trained(model: str, optimizer: str, name: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of four steps, the rate another one in each."""
    backend = problems.start(name, recipe(model, optimizer))
    batch = MODELS[model][1]
    made = [
        backend.train_step(backend.place(batch(step)), step=step, lr=1e-3 * (step + 1))
        for step in range(4)
    ]
    return [m["loss"].item() for m in made], [m["grad_norm"].item() for m in made]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_losses_and_norms_agree_with_eager(model: str, optimizer: str) -> None:
    losses, norms = trained(model, optimizer, "eager")
    assert losses != trained(model, "sgd", "eager")[0] or optimizer == "sgd"
    got_losses, got_norms = trained(model, optimizer, "openxla_step")
    assert got_losses == pytest.approx(losses, rel=1e-5)
    assert got_norms == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_agree_with_autograd(model: str) -> None:
    """What a step of plain SGD with rate 1 takes off the parameters is their gradient."""
    plain = recipe(model, "sgd")
    batch = MODELS[model][1](0)
    plain.loss(plain.model.train(), batch).backward()
    backend = problems.start("openxla_step", recipe(model, "sgd"))
    before = problems.host(backend.state(0).params)
    backend.train_step(backend.place(batch), step=0, lr=1.0)
    after = problems.host(backend.state(1).params)
    for key, parameter in plain.model.named_parameters():
        assert parameter.grad is not None
        got = before[key] - after[key]
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6, msg=key)
