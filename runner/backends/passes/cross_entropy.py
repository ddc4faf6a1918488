"""Cross entropy of class numbers without an int64 one-hot and without stored probabilities.

torch_xla's `nll_loss` builds an int64 one-hot of examples x classes, and `log_softmax` keeps
float32 log-probabilities for the backward pass. Here the right class is found by comparing int32
numbers, which XLA fuses, and the backward pass computes the probabilities again from the logits.
Exact but for the order of sums; float32 throughout. Targets that are probabilities are left as
they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from runner.backends.passes.casts import LOW
from runner.backends.passes.rewrite import Function, Rewrite, autocast_type, transformed

_NONE, _MEAN = 0, 1  # torch.nn._reduction
_NLL: Function = getattr(torch._C._nn, "nll_loss_nd")  # noqa: B009 - mypy does not know it
_Pair = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class _Options:
    """Arguments of `cross_entropy_loss` after the first two, in its order."""

    weight: Tensor | None = None
    reduction: int = _MEAN
    ignore_index: int = -100
    label_smoothing: float = 0.0


class CrossEntropy(Rewrite):
    """`F.cross_entropy`, `nn.CrossEntropyLoss`, `F.nll_loss` and `nn.NLLLoss`."""

    calls = (torch._C._nn.cross_entropy_loss, _NLL)

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        if transformed() or len(args) < 2 or not _suits(*args[:2]):
            return proceed(*args, **kwargs)
        scores, target, *rest = args
        options = _Options(*rest, **kwargs)
        self.count += 1
        nll = proceed is _NLL
        scores = scores.float() if scores.dtype in LOW else scores
        if scores.dim() == 1:
            losses, weights = _rows(scores[None], target[None], options, nll=nll)
            losses, weights = losses[0], weights[0]
        else:
            losses, weights = _rows(scores, target, options, nll=nll)
        if options.reduction == _NONE:
            return losses
        total = losses.sum()
        return total / weights.sum() if options.reduction == _MEAN else total


def _suits(scores: Any, target: Any) -> bool:
    """Whether targets are class numbers and the loss is to be computed in float32 or more."""
    if not isinstance(scores, Tensor) or not isinstance(target, Tensor):
        return False
    if scores.dim() == 0 or target.is_floating_point():
        return False
    return scores.dtype not in LOW or autocast_type(scores) is not None


def _rows(scores: Tensor, target: Tensor, options: _Options, *, nll: bool) -> _Pair:
    """Loss and weight of each target; both 0 where it is to be ignored.

    Args:
        scores: [rows, classes, ...].
        target: [rows, ...].
        options: What the loss was called with.
        nll: Whether scores are log-probabilities already.
    """
    counted = target != options.ignore_index
    numbers = _along_classes(torch.arange(scores.shape[1], device=scores.device), scores)
    right = target.to(torch.int32).unsqueeze(1) == numbers.to(torch.int32)
    if options.weight is None:
        per_class, weights = None, counted.to(scores.dtype)
    else:
        per_class = _along_classes(options.weight.detach().to(scores.dtype), scores)
        weights = torch.where(right, per_class, 0.0).sum(1) * counted
    if nll:
        return -torch.where(right, scores, 0.0).sum(1) * weights, weights
    wanted = _Wanted(right, weights, per_class, options.label_smoothing)
    losses: Tensor = _Loss.apply(scores, wanted)  # type: ignore[no-untyped-call]
    return torch.where(counted, losses, 0.0), weights


def _along_classes(values: Tensor, scores: Tensor) -> Tensor:
    """A value for each class, shaped to meet the scores."""
    return values.view(1, -1, *[1] * (scores.dim() - 2))


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """How much of each class a row wants: its weight at the right one, smoothed over all.

    Attributes:
        right: Where the right class is, in the scores' shape.
        weights: Weight of each row.
        per_class: Weight of each class, or None for 1.
        smoothing: What is taken from the right class and spread over all.
    """

    right: Tensor
    weights: Tensor
    per_class: Tensor | None
    smoothing: float

    def of(self, values: Tensor) -> Tensor:
        """The wanted classes' values of each row, summed."""
        total = torch.where(self.right, values, 0.0).sum(1) * self.weights
        if self.smoothing:
            spread = values if self.per_class is None else values * self.per_class
            total = (1 - self.smoothing) * total + self.smoothing * spread.mean(1)
        return total

    def mass(self) -> Tensor:
        """The same for values that are all 1."""
        if not self.smoothing:
            return self.weights
        spread = 1.0 if self.per_class is None else self.per_class.mean()
        return (1 - self.smoothing) * self.weights + self.smoothing * spread

    def each(self) -> Tensor:
        """How much of each class, in the scores' shape."""
        wanted = torch.where(self.right, self.weights.unsqueeze(1), 0.0)
        if self.smoothing:
            spread = 1.0 if self.per_class is None else self.per_class
            wanted = (1 - self.smoothing) * wanted + self.smoothing / wanted.shape[1] * spread
        return wanted


def _losses(scores: Tensor, wanted: _Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row, its largest score, and the logarithm of the others' sum beside it."""
    top = scores.amax(1, keepdim=True)
    below = scores - top
    log_sum = below.exp().sum(1, keepdim=True).log()
    return wanted.mass() * log_sum.squeeze(1) - wanted.of(below), top, log_sum


class _Loss(torch.autograd.Function):
    """Loss of each row; the backward pass computes probabilities from the scores again."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, wanted: _Wanted) -> Tensor:
        losses, top, log_sum = _losses(scores, wanted)
        ctx.save_for_backward(scores, top, log_sum)
        ctx.wanted = wanted
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        scores, top, log_sum = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants gradients of gradients
            losses, *_ = _losses(scores, ctx.wanted)
            return torch.autograd.grad(losses, scores, grads, create_graph=True)[0], None
        shares = ((scores - top) - log_sum).exp() * ctx.wanted.mass().unsqueeze(1)
        return (shares - ctx.wanted.each()) * grads[0].unsqueeze(1), None
