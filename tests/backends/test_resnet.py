"""The main job's model on every backend that trains, against plain PyTorch on the host.

Losses are compared at a low rate: BatchNorm on small batches amplifies rounding, so that at a
high one even two float types of one backend part ways. Gradients are compared with float64, each
backend's best batch of several: where rounding puts one of a million ReLU inputs on the other
side of zero, the error jumps a hundredfold, for eager as for XLA; a wrong gradient is wrong in
every batch.
"""

from __future__ import annotations

import functools

import pytest
import torch

from jobs.resnet import ResNet
from runner.backends.base import Recipe
from tests.backends import problems

SETTINGS = {"depth": 18, "stem": "small", "zero_init_residual": False, "label_smoothing": 0.0}
BATCHES = 6
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
def errors(name: str) -> list[float]:
    """Largest relative error of a parameter's gradient against float64, for each of some batches.

    The gradient is what a step of plain SGD with rate 1 takes off the parameters.
    """
    backend = problems.start(name, recipe())
    first = problems.saved(backend.state(0))
    exact = recipe()
    model = exact.model.double().train()
    largest = []
    for number in range(BATCHES):
        backend.load(first)
        backend.train_step(backend.place(batch(number)), step=0, lr=1.0)
        after = problems.host(backend.state(1).params)
        model.zero_grad()
        exact.loss(model, doubled(batch(number))).backward()
        largest.append(
            max(
                relative_error(first.params[key] - after[key], p.grad)
                for key, p in model.named_parameters()
            )
        )
    return largest


def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}


def relative_error(got: torch.Tensor, exact: torch.Tensor | None) -> float:
    assert exact is not None
    return ((got.double() - exact).norm() / exact.norm()).item()


@functools.cache
def trained(name: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of three steps at a low rate."""
    backend = problems.start(name, recipe())
    steps = [
        backend.train_step(backend.place(batch(step)), step=step, lr=1e-3) for step in range(3)
    ]
    return [s["loss"].item() for s in steps], [s["grad_norm"].item() for s in steps]


@pytest.mark.parametrize("name", ["lazy", "openxla", "openxla_step"])
def test_resnet_gradients_at_step_1_are_as_exact_as_those_of_eager(name: str) -> None:
    assert min(errors("eager")) < 3e-5
    assert min(errors(name)) < 2 * min(errors("eager"))


@pytest.mark.parametrize("name", ["lazy", "openxla", "openxla_step"])
def test_resnet_losses_and_norms_agree_with_eager(name: str) -> None:
    losses, norms = trained("eager")
    assert trained(name)[0] == pytest.approx(losses, rel=1e-4)
    assert trained(name)[1] == pytest.approx(norms, rel=1e-3)
