"""Every backend gives the same numbers as plain PyTorch on the host."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.backends import problems

XLA = ["lazy", "openxla", "openxla_step"]
OPTIMIZERS = {"sgd": problems.sgd, "adamw": problems.adamw}


@pytest.mark.parametrize("name", XLA)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_agree_with_eager_over_several_steps(name: str, optimizer: str) -> None:
    make = OPTIMIZERS[optimizer]
    expected = problems.losses(problems.start("eager", problems.recipe(make)))
    got = problems.losses(problems.start(name, problems.recipe(make)))
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", XLA)
def test_gradients_of_the_first_step_agree_with_eager(name: str) -> None:
    def plain_sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    def gradients(backend_name: str) -> dict[str, torch.Tensor]:
        backend = problems.start(backend_name, problems.recipe(plain_sgd))
        before = problems.host(backend.state(0).params)
        backend.train_step(backend.place(problems.batch(0)), step=0, lr=1.0)
        after = problems.host(backend.state(1).params)
        return {key: before[key] - after[key] for key in before}

    expected, got = gradients("eager"), gradients(name)
    assert expected["conv.weight"].abs().max() > 0
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["eager", *XLA])
def test_accumulation_over_micro_batches_gives_their_mean_gradient(name: str) -> None:
    backend = problems.start(name, problems.recipe(accumulate=2))
    reference = problems.recipe()
    halves = [{k: v[i::2] for k, v in problems.batch(0).items()} for i in range(2)]
    mean = sum(reference.loss(reference.model.train(), half) for half in halves) / 2
    mean.backward()
    grads = [p.grad for p in reference.model.parameters() if p.grad is not None]
    metrics = backend.train_step(backend.place(problems.batch(0)), step=0, lr=0.1)
    assert metrics["loss"].item() == pytest.approx(mean.item(), rel=1e-5)
    expected_norm = torch.nn.utils.get_total_norm(grads).item()
    assert metrics["grad_norm"].item() == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize("name", XLA)
def test_clipping_limits_the_update_as_in_eager(name: str) -> None:
    expected = problems.losses(problems.start("eager", problems.recipe(clip_norm=0.05)), lr=0.5)
    got = problems.losses(problems.start(name, problems.recipe(clip_norm=0.05)), lr=0.5)
    unclipped = problems.losses(problems.start("eager", problems.recipe()), lr=0.5)
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected[-1] != pytest.approx(unclipped[-1], rel=1e-3)


@pytest.mark.parametrize("name", ["eager", *XLA])
def test_evaluation_counts_only_unmasked_examples_and_changes_nothing(name: str) -> None:
    backend = problems.start(name, problems.recipe())
    before = problems.host(backend.state(0).buffers)
    placed = backend.place({**problems.batch(3), "mask": torch.tensor([1.0] * 5 + [0.0] * 3)})
    mask = placed.pop("mask")
    got = backend.eval_step(placed, mask)["accuracy"].item()
    reference = problems.recipe()
    model = reference.model.eval()
    with torch.no_grad():
        expected = reference.evaluate(model, problems.batch(3))["accuracy"][:5].sum().item()
    assert got == expected
    after = problems.host(backend.state(0).buffers)
    assert all(torch.equal(before[key], after[key]) for key in before)


class Dropped(nn.Module):
    """Weights of which half are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64))

    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(self.weight, 0.5, self.training)


@pytest.mark.parametrize("name", XLA)
def test_gradients_through_dropout_are_those_of_what_it_kept(name: str) -> None:
    """Along its own direction, a small step changes the loss by what the gradient says.

    torch_xla's own gradient of dropout is larger, by 1 / (1 - p).
    """
    work = dataclasses.replace(
        problems.recipe(),
        model=Dropped(),
        loss=lambda model, batch: (model(batch["image"]) - 1).square().mean(),
    )
    backend, rate = problems.start(name, work), 1e-3
    placed = [backend.place(problems.batch(0)) for _ in range(2)]
    seen = [backend.train_step(each, step=0, lr=rate) for each in placed]
    before, after = (metrics["loss"].item() for metrics in seen)
    assert (before - after) / rate == pytest.approx(seen[0]["grad_norm"].item() ** 2, rel=0.01)


@pytest.mark.parametrize("name", ["eager", *XLA])
def test_dropout_is_a_function_of_seed_and_step(name: str) -> None:
    def run(seed: int) -> list[float]:
        work = problems.recipe(dropout=0.5, seed=seed)
        return problems.losses(problems.start(name, work), 3, lr=1e-9)

    first = run(1)
    assert first == run(1)
    assert first != run(2)


@pytest.mark.parametrize("name", ["eager", *XLA])
def test_a_loaded_state_continues_with_equal_losses(name: str) -> None:
    whole = problems.start(name, problems.recipe(problems.adamw, dropout=0.3))
    problems.losses(whole, 2)
    saved = problems.saved(whole.state(2))
    expected = problems.losses(whole, 3, first=2)
    other = problems.start(name, problems.recipe(problems.adamw, dropout=0.3))
    other.load(saved)
    assert problems.losses(other, 3, first=2) == expected


@pytest.mark.parametrize("name", ["lazy", "openxla"])
def test_shared_parameters_stay_shared_on_the_device(name: str) -> None:
    backend = problems.start(name, problems.recipe())
    problems.losses(backend, 2)
    assert "again.weight" not in backend.state(2).params
    assert backend.model.again.weight is backend.model.hidden.weight  # type: ignore[attr-defined]
