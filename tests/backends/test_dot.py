"""The product with several leading dimensions is torch's, as one operation of the program."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor
from torch_xla.backends import set_mat_mul_precision

from runner.xla.binding import binding
from runner.xla.device import open_device
from runner.xla.dot import dot

_OVER = list(itertools.product((-2, -1), repeat=2))


def _sides(leading: tuple[int, ...], over: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ([5, 5], [5, 5])
    shapes[0][-3 - over[0]], shapes[1][-3 - over[1]] = 3, 4
    left, right = (torch.randn(*leading, *shape, generator=generator) for shape in shapes)
    return left, right


@pytest.mark.parametrize("over", _OVER)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3)])
def test_values_on_every_device(leading: tuple[int, ...], over: tuple[int, int]) -> None:
    left, right = _sides(leading, over)
    expected = torch.einsum(
        f"...{'ka' if over[0] == -2 else 'ak'},...{'kb' if over[1] == -2 else 'bk'}->...ab",
        left,
        right,
    )
    device = open_device()
    with torch.no_grad():
        there = dot(left.to(device), right.to(device), over=over)
        torch.testing.assert_close(there.cpu(), expected)
        torch.testing.assert_close(dot(left, right, over=over), expected)
        described = dot(left.to("meta"), right.to("meta"), over=over)
    assert (described.shape, described.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(dot(left, right, over=over), expected)  # with gradients


def _program() -> str:
    left, right = (one.to(open_device()) for one in _sides((2, 3), (-1, -1)))
    with torch.no_grad():
        text: str = binding._get_xla_tensors_hlo([dot(left, right, over=(-1, -1))])
    return text


def test_a_precision_that_somebody_has_set_is_kept() -> None:
    set_mat_mul_precision("highest")
    try:
        assert "operand_precision={highest,highest}" in _program()
    finally:
        set_mat_mul_precision("default")
    assert "operand_precision" not in _program()


def test_leading_dimensions_stay_apart_in_the_program() -> None:
    text = _program()
    assert re.search(r"lhs_batch_dims=\{0,1\}", text), text
    assert "reshape" not in text
