"""Cross entropy by way of its pass has the values and gradients of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from runner.backends.passes.pipeline import Passes
from runner.config.schema import PassesConfig
from tests.backends.passes.compare import rewritten

ROWS, CLASSES, WIDE = 6, 10, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _entropy(target: Tensor, *, weighted: bool = False, **options: Any) -> Callable[..., Tensor]:
    per_class = torch.linspace(0.5, 2, CLASSES)

    def function(scores: Tensor) -> Tensor:
        weight = per_class.to(scores.dtype) if weighted else None
        loss = F.cross_entropy(scores, target, weight, **options)
        rows = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        return (loss * rows).sum()

    return function


def _target(*shape: int) -> Tensor:
    target = torch.randint(0, CLASSES, shape)
    target.view(-1)[1] = -100
    return target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("more", [(), (WIDE,)])
def test_every_option(
    reduction: str, smoothing: float, weighted: bool, more: tuple[int, ...]
) -> None:
    options = {"reduction": reduction, "label_smoothing": smoothing, "weighted": weighted}
    function = _entropy(_target(ROWS, *more), **options)
    scores = 3 * torch.randn(ROWS, CLASSES, *more)
    assert rewritten(function, scores)["cross_entropy"] == 1


def test_an_index_to_ignore_and_a_single_row() -> None:
    scores = torch.randn(ROWS, CLASSES)
    target = torch.randint(0, 2, (ROWS,))
    target[:2] = torch.tensor([0, 1])
    assert rewritten(_entropy(target, ignore_index=1), scores)["cross_entropy"] == 1
    assert rewritten(_entropy(torch.tensor(3)), scores[0])["cross_entropy"] == 1


def test_large_scores_lose_nothing() -> None:
    scores = 1e4 + torch.arange(CLASSES).float().expand(ROWS, -1)
    target = torch.full((ROWS,), CLASSES - 1)
    assert rewritten(_entropy(target), scores)["cross_entropy"] == 1


def test_a_class_that_is_ruled_out_costs_no_other_anything() -> None:
    def function(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores.index_fill(1, torch.tensor([0]), -torch.inf), target)

    target = torch.randint(1, CLASSES, (ROWS,))
    assert rewritten(function, torch.randn(ROWS, CLASSES))["cross_entropy"] == 1


def test_negative_log_likelihood() -> None:
    target = _target(ROWS)

    def function(scores: Tensor) -> Tensor:
        per_class = torch.linspace(0.5, 2, CLASSES, dtype=scores.dtype)
        return F.nll_loss(F.log_softmax(scores, 1), target, per_class)

    assert rewritten(function, torch.randn(ROWS, CLASSES))["cross_entropy"] == 1


def test_gradients_have_gradients() -> None:
    plain = _entropy(_target(ROWS), label_smoothing=0.1)

    def function(scores: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(plain(scores), scores, create_graph=True)
        return first.square().sum()

    assert rewritten(function, torch.randn(ROWS, CLASSES))["cross_entropy"] == 1


def test_targets_that_are_probabilities_are_left_alone() -> None:
    wanted = torch.softmax(torch.randn(ROWS, CLASSES), 1)

    def function(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, wanted.to(scores.dtype))

    assert rewritten(function, torch.randn(ROWS, CLASSES)) == {}


def test_bf16_scores_under_autocast_are_computed_in_float32() -> None:
    scores, target = torch.randn(ROWS, CLASSES).to(torch.bfloat16), _target(ROWS)
    passes = Passes(PassesConfig())
    leaf = scores.requires_grad_()
    with passes.rewriting(), torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(leaf, target)
    wide = scores.detach().float().requires_grad_()
    expected = F.cross_entropy(wide, target)
    assert passes.made == {"cross_entropy": 1}
    torch.testing.assert_close(loss, expected)
    (found,), (gradient,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, wide)
    torch.testing.assert_close(found, gradient.to(torch.bfloat16), rtol=2**-7, atol=0)


def test_bf16_scores_without_autocast_are_torchs_own_affair() -> None:
    scores, target = torch.randn(ROWS, CLASSES).to(torch.bfloat16), _target(ROWS)
    passes = Passes(PassesConfig())
    with passes.rewriting():
        loss = F.cross_entropy(scores, target)
    assert passes.made == {}
    assert loss.dtype == torch.bfloat16


def test_gradients_of_single_samples() -> None:
    """Of `torch.func`: a vmap over gradients."""
    scores, target = torch.randn(ROWS, CLASSES), torch.arange(ROWS)
    each = torch.func.vmap(torch.func.grad(F.cross_entropy))
    with Passes(PassesConfig()).rewriting():
        found = each(scores, target)
    torch.testing.assert_close(found, scores.softmax(-1) - F.one_hot(target, CLASSES))
