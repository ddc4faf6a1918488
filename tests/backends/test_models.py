"""The jobs' own models under the optimizers that people use: losses equal plain PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.base import Job
from jobs.gpt import GPTJob
from jobs.mlp import MLP
from jobs.resnet import ResNet
from runner.backends.base import Recipe
from tests.backends import problems

STEPS, EXAMPLES = 4, 8
IMAGES = {"classes": 10, "channels": 3, "image_size": 17}
TEXT = {"vocabulary": 64, "seq_len": 16}
#: With rates at which training goes on quietly; see test_resnet about BatchNorm and rounding.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], float, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, 1e-3, {}),
    "momentum": (torch.optim.SGD, 1e-3, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, 1e-4, {}),
    "adamw, foreach": (torch.optim.AdamW, 1e-4, {"foreach": True, "weight_decay": 0.1}),
    "adamw, one by one": (torch.optim.AdamW, 1e-4, {"foreach": False, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, 1e-5, {}),
}


def resnet() -> Job:
    settings = {"depth": 18, "stem": "small", "zero_init_residual": False, "label_smoothing": 0.0}
    return ResNet(settings, IMAGES)


def mlp() -> Job:
    return MLP({"width": 32, "depth": 2, "dropout": 0.0}, IMAGES)


def gpt() -> Job:
    settings = {"depth": 2, "width": 32, "heads": 2, "dropout": 0.0, "positions": "rotary"}
    return GPTJob(settings, TEXT)


JOBS: dict[str, Callable[[], Job]] = {"resnet": resnet, "mlp": mlp, "gpt": gpt}


def batch(name: str, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if name == "gpt":
        tokens = torch.randint(0, 64, (EXAMPLES, 17), generator=generator)
        return {"tokens": tokens[:, :-1], "target": tokens[:, 1:]}
    return {
        "image": torch.randn(EXAMPLES, 3, 17, 17, generator=generator),
        "label": torch.randint(0, 10, (EXAMPLES,), generator=generator),
    }


@functools.cache
def trained(name: str, optimizer: str, backend_name: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms."""
    job = JOBS[name]()
    cls, lr, options = OPTIMIZERS[optimizer]
    torch.manual_seed(0)
    work = Recipe(
        model=job.build(),
        loss=job.loss,
        evaluate=job.evaluate,
        make_optimizer=lambda model: cls(model.parameters(), lr=lr, **options),  # type: ignore[call-arg]
    )
    backend = problems.start(backend_name, work)
    made = [
        backend.train_step(backend.place(batch(name, step)), step=step, lr=lr / (1 + step))
        for step in range(STEPS)
    ]
    return [m["loss"].item() for m in made], [m["grad_norm"].item() for m in made]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", JOBS)
def test_a_job_trains_under_an_optimizer_as_it_does_in_eager(name: str, optimizer: str) -> None:
    losses, norms = trained(name, optimizer, "eager")
    got = trained(name, optimizer, "openxla_step")
    loosely = name == "resnet"
    assert got[0] == pytest.approx(losses, rel=1e-4 if loosely else 1e-5)
    assert got[1] == pytest.approx(norms, rel=3e-3 if loosely else 1e-4)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_a_jobs_gradients_are_those_of_eager(name: str) -> None:
    """What a step of plain SGD with rate 1 takes off the parameters; of resnet: test_resnet."""
    expected, got = (gradients(name, backend_name) for backend_name in ("eager", "openxla_step"))
    assert set(got) == set(expected)
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=2e-6, msg=key)


def gradients(name: str, backend_name: str) -> dict[str, Tensor]:
    job = JOBS[name]()
    torch.manual_seed(0)
    work = Recipe(
        model=job.build(),
        loss=job.loss,
        evaluate=job.evaluate,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
    )
    backend = problems.start(backend_name, work)
    before = problems.host(backend.state(0).params)
    backend.train_step(backend.place(batch(name, 0)), step=0, lr=1.0)
    after = problems.host(backend.state(1).params)
    return {key: before[key] - after[key] for key in before}
