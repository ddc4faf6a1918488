"""Optimizer state exists before the first step and is what the optimizer would have made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runner.backends.optimizer import UnsupportedOptimizerError, initial_state

CASES: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Rprop": {},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adadelta": {},
    "ASGD": {},
    "Adafactor": {},
}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_training_from_prepared_state_equals_training_from_none(name: str, foreach: bool) -> None:
    def run(prepared: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        cls = getattr(torch.optim, name)
        optimizer = cls(model.parameters(), lr=0.01, foreach=foreach, **CASES[name])
        if prepared:
            optimizer.state.update(initial_state(optimizer))
        for step in range(3):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [param.detach() for param in model.parameters()]

    for expected, got in zip(run(False), run(True), strict=True):
        assert torch.equal(got, expected)


def test_preparing_state_leaves_the_parameters_as_they_were() -> None:
    param = torch.nn.Parameter(torch.randn(3))
    before = param.detach().clone()
    optimizer = torch.optim.AdamW([param], lr=0.5, weight_decay=0.9)
    state = initial_state(optimizer)
    assert torch.equal(param.detach(), before)
    assert param.grad is None
    assert not optimizer.state
    assert state[param]["step"].item() == 0


def test_a_frozen_parameter_gets_no_state() -> None:
    frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
    param = torch.nn.Parameter(torch.randn(3))
    assert list(initial_state(torch.optim.Adam([frozen, param]))) == [param]


def test_what_differs_between_the_first_step_and_the_others_is_refused() -> None:
    param = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(UnsupportedOptimizerError, match=r"dampening must be 0: .*got 0\.5"):
        initial_state(optimizer)
