"""The product over several dimensions is torch's, as one operation of the program."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_xla.backends import set_mat_mul_precision

from runner.xla.binding import binding
from runner.xla.device import open_device
from runner.xla.dot import dot

#: What is summed on the left and on the right, and the same as an equation.
_PLAIN = [
    (left, right, f"...{'ka' if left == -2 else 'ak'},...{'kb' if right == -2 else 'bk'}->...ab")
    for left, right in itertools.product((-2, -1), repeat=2)
]
_GROUPED = [
    ((2, 3, 4, 5, 6), (2, 3, 7, 6), ([-1], [-1]), "xygak,xybk->xygab"),
    ((2, 3, 4, 5, 6), (2, 3, 6, 7), ([-1], [-2]), "xygak,xykb->xygab"),
    ((2, 3, 4, 5, 6), (2, 3, 4, 5, 7), ([-3, -2], [-3, -2]), "xygka,xygkb->xyab"),
    ((2, 3, 4, 5, 6), (2, 3, 5, 4, 7), ([-3, -2], [-2, -3]), "xygka,xykgb->xyab"),
    ((2, 3, 7, 6), (2, 3, 4, 5, 6), ([-1], [-1]), "xybk,xygak->xybga"),
]


def _random(*shapes: tuple[int, ...]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        yield torch.randn(shape, generator=generator)


def _check(left: Tensor, right: Tensor, equation: str, **options: Any) -> None:
    """On every device, described only, and where gradients are wanted."""
    expected = torch.einsum(equation, left, right)
    device = open_device()
    with torch.no_grad():
        there = dot(left.to(device), right.to(device), **options)
        torch.testing.assert_close(there.cpu(), expected)
        torch.testing.assert_close(dot(left, right, **options), expected)
        described = dot(left.to("meta"), right.to("meta"), **options)
    assert (described.shape, described.dtype) == (expected.shape, expected.dtype)
    leaves = [side.clone().requires_grad_() for side in (left, right)]
    made = dot(*leaves, **options)
    torch.testing.assert_close(made, expected)
    weights = torch.linspace(-1, 2, made.numel()).view(made.shape)
    got = torch.autograd.grad((made * weights).sum(), leaves)
    wanted = torch.autograd.grad((torch.einsum(equation, *leaves) * weights).sum(), leaves)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("left", "right", "equation"), _PLAIN)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3)])
def test_one_dimension_summed(
    leading: tuple[int, ...], left: int, right: int, equation: str
) -> None:
    shapes = ([*leading, 5, 5], [*leading, 5, 5])
    shapes[0][-3 - left], shapes[1][-3 - right] = 3, 4
    sides = _random(*map(tuple, shapes))
    _check(*sides, equation, leading=len(leading), over=([left], [right]))


@pytest.mark.parametrize(("left", "right", "over", "equation"), _GROUPED)
def test_several_dimensions_stay_or_are_summed(
    left: tuple[int, ...],
    right: tuple[int, ...],
    over: tuple[list[int], list[int]],
    equation: str,
) -> None:
    _check(*_random(left, right), equation, leading=2, over=over)


def _program() -> str:
    left, right = (one.to(open_device()) for one in _random((2, 3, 4, 5, 6), (2, 3, 7, 6)))
    with torch.no_grad():
        made = dot(left, right, leading=2, over=([-1], [-1]))
    text: str = binding._get_xla_tensors_hlo([made])
    return text


def test_a_precision_that_somebody_has_set_is_kept() -> None:
    set_mat_mul_precision("highest")
    try:
        assert "operand_precision={highest,highest}" in _program()
    finally:
        set_mat_mul_precision("default")
    assert "operand_precision" not in _program()


def test_dimensions_stay_apart_in_the_program() -> None:
    text = _program()
    assert re.search(r"lhs_batch_dims=\{0,1\}", text), text
    assert "reshape" not in text
