"""The main job's model on every backend that trains, against plain PyTorch on the host.

The rate is low and the gradients are compared at step 1: BatchNorm on small batches amplifies
rounding, so that at a high rate even two float types of one backend part ways.
"""

from __future__ import annotations

import functools

import pytest
import torch

from jobs.resnet import ResNet
from runner.backends.base import Recipe
from tests.backends import problems

SETTINGS = {"depth": 18, "stem": "small", "zero_init_residual": False, "label_smoothing": 0.0}
FACTS = {"classes": 10, "channels": 3, "image_size": 17}
RATE = 1e-3


def recipe() -> Recipe:
    job = ResNet(SETTINGS, FACTS)
    torch.manual_seed(0)
    return Recipe(
        model=job.build(),
        loss=job.loss,
        evaluate=job.evaluate,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=RATE),
    )


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "image": torch.randn(8, 3, 17, 17, generator=generator),
        "label": torch.randint(0, 10, (8,), generator=generator),
    }


@functools.cache
def trained(name: str) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Gradients of step 1, and losses and gradient norms of three steps."""
    backend = problems.start(name, recipe())
    before = problems.host(backend.state(0).params)
    gradients, losses, norms = {}, [], []
    for step in range(3):
        metrics = backend.train_step(backend.place(batch(step)), step=step, lr=RATE)
        losses.append(metrics["loss"].item())
        norms.append(metrics["grad_norm"].item())
        if step == 0:
            after = problems.host(backend.state(1).params)
            gradients = {key: (before[key] - after[key]) / RATE for key in before}
    return gradients, losses, norms


@pytest.mark.parametrize("name", ["lazy", "openxla"])
def test_resnet_gradients_at_step_1_agree_with_eager(name: str) -> None:
    expected, got = trained("eager")[0], trained(name)[0]
    for key, gradient in expected.items():
        error = (got[key] - gradient).norm() / gradient.norm()
        assert error < 1e-3, key


@pytest.mark.parametrize("name", ["lazy", "openxla"])
def test_resnet_losses_and_norms_agree_with_eager(name: str) -> None:
    _, losses, norms = trained("eager")
    assert trained(name)[1] == pytest.approx(losses, rel=1e-4)
    assert trained(name)[2] == pytest.approx(norms, rel=1e-3)
