"""The main job's model on every backend that trains, against plain PyTorch on the host.

The rate is low and the gradients are compared at step 1: BatchNorm on small batches amplifies
rounding, so that at a high rate even two float types of one backend part ways.
"""

from __future__ import annotations

import functools
import statistics

import pytest
import torch

from jobs.resnet import ResNet
from runner.backends.base import Recipe
from tests.backends import problems

SETTINGS = {"depth": 18, "stem": "small", "zero_init_residual": False, "label_smoothing": 0.0}
FACTS = {"classes": 10, "channels": 3, "image_size": 17}


def recipe() -> Recipe:
    job = ResNet(SETTINGS, FACTS)
    torch.manual_seed(0)
    return Recipe(
        model=job.build(),
        loss=job.loss,
        evaluate=job.evaluate,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
    )


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "image": torch.randn(8, 3, 17, 17, generator=generator),
        "label": torch.randint(0, 10, (8,), generator=generator),
    }


@functools.cache
def gradients(name: str) -> dict[str, torch.Tensor]:
    """Gradients of step 1, as what a step of plain SGD with rate 1 takes off the parameters."""
    backend = problems.start(name, recipe())
    before = problems.host(backend.state(0).params)
    backend.train_step(backend.place(batch(0)), step=0, lr=1.0)
    after = problems.host(backend.state(1).params)
    return {key: before[key] - after[key] for key in before}


@functools.cache
def exact_gradients() -> dict[str, torch.Tensor]:
    """The same gradients in float64."""
    work = recipe()
    model = work.model.double().train()
    work.loss(
        model, {key: t.double() if t.is_floating_point() else t for key, t in batch(0).items()}
    ).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def errors(name: str) -> dict[str, float]:
    """Relative error of each parameter's gradient against float64."""
    got = gradients(name)
    return {
        key: ((got[key].double() - exact).norm() / exact.norm()).item()
        for key, exact in exact_gradients().items()
    }


@functools.cache
def trained(name: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of three steps at a low rate."""
    backend = problems.start(name, recipe())
    steps = [
        backend.train_step(backend.place(batch(step)), step=step, lr=1e-3) for step in range(3)
    ]
    return [s["loss"].item() for s in steps], [s["grad_norm"].item() for s in steps]


@pytest.mark.parametrize("name", ["lazy", "openxla"])
def test_resnet_gradients_at_step_1_are_as_near_to_float64_as_those_of_eager(name: str) -> None:
    of_eager, of_backend = errors("eager"), errors(name)
    assert max(of_backend.values()) < 2 * max(of_eager.values())
    assert statistics.median(of_backend.values()) < 2 * statistics.median(of_eager.values())


@pytest.mark.parametrize("name", ["lazy", "openxla"])
def test_resnet_losses_and_norms_agree_with_eager(name: str) -> None:
    losses, norms = trained("eager")
    assert trained(name)[0] == pytest.approx(losses, rel=1e-4)
    assert trained(name)[1] == pytest.approx(norms, rel=1e-3)
