"""Gradients that torch_xla gets wrong, or refuses, are plain PyTorch's on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.backends.base import Backend, Recipe
from runner.xla.device import open_device, to_host
from tests.backends import problems


class Frozen(nn.Module):
    """A batch norm whose statistics are held fast while what is around it is trained."""

    def __init__(self, *, affine: bool = True) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.norm = nn.BatchNorm2d(4, affine=affine)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def train(self, mode: bool = True) -> Frozen:
        """As ever, but for the norm."""
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.after(self.norm(self.before(images)).sin().mean((2, 3)))
        return made


class Activated(nn.Module):
    """An activation that is not in place."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.activation = nn.Conv2d(3, 4, 3), activation

    def forward(self, images: Tensor) -> Tensor:
        return self.activation(3 * self.before(images))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "frozen": Frozen,
    "frozen_plain": lambda: Frozen(affine=False),
    "elu": lambda: Activated(lambda x: F.elu(x, 0.7)),
    "celu": lambda: Activated(lambda x: F.celu(x, 0.7)),
    "selu": lambda: Activated(F.selu),
}


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = model(batch["input"]).square().mean()
    return result


def _sizes(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"size": model(batch["input"]).square().flatten(1).mean(1)}


def _update(name: str, backend_name: str) -> dict[str, Tensor]:
    """The parameters after one step, less those before."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    recipe = Recipe(model, _loss, _sizes, lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    backend = problems.start(backend_name, recipe)
    before = _params(backend, 0)
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    backend.train_step(backend.place({"input": images}), step=0, lr=1.0)
    after = _params(backend, 1)
    return {key: after[key] - before[key] for key in before}


def _params(backend: Backend, step: int) -> dict[str, Tensor]:
    params = backend.state(step).params
    values = [one.clone() for one in backend.to_host(list(params.values()))]
    return dict(zip(params, values, strict=True))


def test_second_gradients_of_large_numbers_are_numbers() -> None:
    x = torch.tensor([-1.0, 1.0, 200.0]).to(open_device()).requires_grad_()
    (gradient,) = torch.autograd.grad(F.elu(x).sum(), x, create_graph=True)
    (second,) = to_host(torch.autograd.grad(gradient.sum(), x))
    torch.testing.assert_close(second, torch.tensor([math.exp(-1.0), 0.0, 0.0]))


@pytest.mark.parametrize("backend", ["lazy", "openxla", "openxla_step"])
@pytest.mark.parametrize("name", MODELS)
def test_an_update_is_that_of_eager(name: str, backend: str) -> None:
    expected = _update(name, "eager")
    assert any(one.any() for one in expected.values())
    torch.testing.assert_close(_update(name, backend), expected, rtol=1e-4, atol=1e-6)
