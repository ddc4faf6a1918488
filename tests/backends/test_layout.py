"""Buffers of a step: nothing is lost between tensors and buffers, and small ones share."""

from __future__ import annotations

import pytest
import torch

from runner.backends.step.layout import SMALL, Layout

TENSORS = [
    torch.arange(6.0).reshape(2, 3),
    torch.arange(SMALL + 1.0),
    torch.tensor(7.0),
    torch.arange(4.0),
    torch.tensor([1, 2]),
    torch.tensor(7.0),
    torch.arange(6.0).reshape(2, 3).t(),
    torch.rand(40, 30, 3, 2),
    torch.rand(2, 10, 7, 6, 5),
]
ROLES = ["weight", "weight", "step", "weight", "count", "step", "weight", "weight", "weight"]


def test_what_is_packed_comes_back() -> None:
    layout = Layout(TENSORS, merged={5: 2}, roles=ROLES)
    back = layout.unpack(layout.pack(TENSORS))
    assert len(back) == len(TENSORS)
    for tensor, other in zip(TENSORS, back, strict=True):
        assert tensor.shape == other.shape
        assert torch.equal(tensor, other)


def test_small_tensors_of_a_role_share_a_buffer_and_others_have_their_own() -> None:
    layout = Layout(TENSORS, merged={5: 2}, roles=ROLES)
    buffers = layout.pack(TENSORS)
    assert len(buffers) == len(layout) == 7
    assert layout.held == [[1], [2], [4], [6], [7], [8], [0, 3]]
    assert torch.equal(buffers[-1], torch.cat([TENSORS[0].reshape(-1), TENSORS[3]]))


def test_merged_tensors_are_one_and_known_as_equal() -> None:
    layout = Layout(TENSORS, merged={5: 2}, roles=ROLES)
    back = layout.unpack(layout.pack(TENSORS))
    assert back[5] is back[2]
    assert layout.equal_groups() == [[2, 5]]


@pytest.mark.parametrize("roles", [[None] * 9, list("abcdefghi")])
def test_tensors_without_a_common_role_keep_their_buffers(roles: list[str | None]) -> None:
    layout = Layout(TENSORS[:7], merged={}, roles=roles[:7])
    assert len(layout) == 7
    assert all(a is b for a, b in zip(layout.pack(TENSORS[:7]), TENSORS[:7], strict=True))


def test_kernels_lie_with_their_window_first() -> None:
    layout = Layout(TENSORS, merged={}, roles=ROLES)
    shapes = {tuple(buffer.shape) for buffer in layout.pack(TENSORS)}
    assert (3, 2, 30, 40) in shapes
    assert (7, 6, 5, 10, 2) in shapes


def test_a_tensor_without_a_role_stays_as_it_is() -> None:
    kernel = TENSORS[7]
    layout = Layout([kernel], merged={}, roles=[None])
    assert layout.pack([kernel])[0] is kernel
