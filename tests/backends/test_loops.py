"""Loops on the device: `runner.xla.scan`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from runner.xla import device
from runner.xla.program import Program, upload
from runner.xla.scan import scan

ROUNDS = 4
Parts = Sequence[Tensor]


def looped(reverse: bool) -> tuple[Tensor, Tensor]:
    """x * slice + constant, round by round; put out is what went in."""
    device.open_device()
    start, slices = torch.ones(3), torch.arange(1.0, ROUNDS + 1).reshape(ROUNDS, 1).repeat(1, 3)

    def body(carry: Parts, inputs: Parts, constants: Parts) -> tuple[list[Tensor], list[Tensor]]:
        return [carry[0] * inputs[0] + constants[0]], [carry[0]]

    def run(x: Tensor, slices: Tensor, constant: Tensor) -> list[Tensor]:
        carry, outputs = scan(body, [x], inputs=[slices], constants=[constant], reverse=reverse)
        return [*carry, *outputs]

    inputs = upload([start, slices, torch.tensor(0.5)])
    last, outputs = Program(run, inputs)(inputs)
    return last.cpu(), outputs.cpu()


@pytest.mark.parametrize("reverse", [False, True])
def test_rounds_follow_each_other(reverse: bool) -> None:
    expected, rows = torch.tensor(1.0), []
    order = range(ROUNDS, 0, -1) if reverse else range(1, ROUNDS + 1)
    for factor in order:
        rows.append(expected)
        expected = expected * factor + 0.5
    last, outputs = looped(reverse)
    assert last.tolist() == [expected] * 3
    assert outputs[:, 0].tolist() == (rows[::-1] if reverse else rows)


def test_views_are_operations_and_not_gathers() -> None:
    """Below functionalization XLA takes a part of a tensor by a table of indices."""
    device.open_device()

    def body(carry: Parts, inputs: Parts, _: Parts) -> tuple[list[Tensor], list[Tensor]]:
        left, right = carry[0].split(2, dim=-1)
        return [torch.cat([right, left], dim=-1) * inputs[0]], []

    inputs = upload([torch.arange(8.0).reshape(2, 4), torch.ones(3, 2, 4)])
    program = Program(lambda x, ones: scan(body, [x], inputs=[ones])[0], inputs)
    assert program.facts.parameters == len(inputs)
    (last,) = program(inputs)
    assert last.tolist() == [[2, 3, 0, 1], [6, 7, 4, 5]]


def test_what_is_carried_keeps_its_type() -> None:
    device.open_device()
    inputs = upload([torch.ones(3), torch.ones(ROUNDS, 3)])
    with pytest.raises(ValueError, match=r"as it was: torch.float32\[3\]; got torch.float64\[3\]"):
        Program(
            lambda x, ones: scan(lambda c, i, k: ([c[0].double()], []), [x], inputs=[ones])[0],
            inputs,
        )
