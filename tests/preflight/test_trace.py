"""The traced step: what its arguments are, what was donated, where operations came from."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runner.backends.step.function import StepFunction
from runner.config.names import OPTIMIZERS
from runner.preflight.tpu_compiler import hlo_text
from runner.preflight.trace import TracedStep, trace
from runner.xla.placeholder import LoweringError
from tests.preflight.problems import adamw, recipe, traced


class Net(nn.Module):
    """A convolution, a norm with buffers, a frozen layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.norm(self.conv(x)))
        return torch.tanh(self.head(self.frozen(maps.mean((2, 3)))))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.fixture(scope="module")
def step() -> TracedStep:
    return traced(Net, 4, 3, 12, 12, make_optimizer=optimizer)


def test_every_argument_has_the_name_and_size_of_what_it_is(step: TracedStep) -> None:
    arguments = {argument.name: argument for argument in step.arguments}
    model = Net()
    for name, parameter in model.named_parameters():
        assert arguments[f"params/{name}"].shape == tuple(parameter.shape)
        assert arguments[f"params/{name}"].bytes == 4 * parameter.numel()
    assert arguments["buffers/norm.running_var"].shape == (8,)
    assert arguments["optimizer/conv.weight/exp_avg"].shape == (8, 3, 3, 3)
    assert arguments["batch/x"].shape == (4, 3, 12, 12)
    assert arguments["lr/0"].shape == ()


def test_state_that_is_replaced_is_donated_and_nothing_else(step: TracedStep) -> None:
    donated = {argument.name for argument in step.arguments if argument.donated}
    assert "params/conv.weight" in donated
    assert "buffers/norm.running_mean" in donated
    assert "optimizer/conv.weight/exp_avg_sq" in donated
    assert not {"params/frozen.weight", "batch/x", "lr/0"} & donated
    assert donated == {name for name in step.results if "/" in name}
    assert {"loss", "grad_norm"} <= set(step.results)


def test_arguments_lie_on_the_mesh_as_a_run_lays_them(step: TracedStep) -> None:
    lying = {argument.name: argument.partition for argument in step.arguments}
    assert lying["params/conv.weight"] == (("fsdp",), (), (), ())
    assert lying["optimizer/conv.weight/exp_avg"] == (("fsdp",), (), (), ())
    assert lying["batch/x"] == (("fsdp",), (), (), ())
    assert lying["buffers/norm.running_var"] == ((),)
    assert not lying["lr/0"]


def test_equal_step_counters_are_carried_once(step: TracedStep) -> None:
    assert sum(argument.name.endswith("/step") for argument in step.arguments) == 1


def test_the_callers_autocast_is_not_the_steps() -> None:
    with torch.autocast("xla", torch.bfloat16):
        step = traced(Net, 4, 3, 12, 12, make_optimizer=optimizer)
    assert "f32[" in hlo_text(step.hlo)
    assert "bf16[" not in hlo_text(step.hlo)


def test_operations_know_their_module_and_line(step: TracedStep) -> None:
    origins = {(one.name, one.origin.phase): one.origin for one in step.operations}
    forward = origins["convolution", "forward"]
    backward = origins["convolution_backward", "backward"]
    assert forward.module == backward.module == "conv"
    assert forward.file == backward.file == __file__
    lines = pathlib.Path(__file__).read_text().splitlines()
    assert "self.norm(self.conv(x))" in lines[forward.line - 1]
    assert "torch.tanh" in lines[origins["tanh", "forward"].line - 1]
    assert origins["tanh", "forward"].module == ""
    assert "optimizer" in {one.origin.phase for one in step.operations}


class Mixer(nn.Module):
    """A layer, then attention, by a pass an operation of autograd that is the runner's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.mix = Mix()

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(self.first(x))
        return mixed


class Mix(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_what_a_pass_makes_of_a_call_has_the_calls_module_and_line() -> None:
    step = traced(Mixer, 2, 4, 8, make_optimizer=optimizer)
    assert step.passes == {"attention": 1}
    products = [one.origin for one in step.operations if one.name == "dot"]
    phases = [origin.phase for origin in products]
    assert phases == ["forward"] * 2 + ["backward"] * 4
    assert {origin.module for origin in products} == {"mix"}
    (line,) = {origin.line for origin in products}
    assert "scaled_dot_product" in pathlib.Path(__file__).read_text().splitlines()[line - 1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizers_state_is_described_as_it_is_made(name: str) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        cls: Any = getattr(torch.optim, name)
        made: torch.optim.Optimizer = cls(model.parameters(), lr=0.1)
        return made

    step = traced(lambda: nn.Linear(8, 4, bias=False), 2, 8, make_optimizer=make)
    described = [one.name for one in step.arguments if one.group in ("params", "optimizer")]
    work = recipe(lambda: nn.Linear(8, 4, bias=False), make)
    real = StepFunction(
        dataclasses.replace(work, model=nn.Linear(8, 4, bias=False)), device_type="xla"
    )
    names = [f"{one.group}/{one.name}" for one in real.carried]
    shared = {other for group in real.equal_scalars(real.initial) for other in group[1:]}
    read = {name for i, name in enumerate(names) if i not in shared}
    assert set(described) <= read
    assert {name for name in read if not name.endswith("/step")} <= {*described, *UNREAD}


#: State that the first step's program overwrites without reading it.
UNREAD = {"optimizer/weight/eta", "optimizer/weight/mu"}


class Median(nn.Module):
    """An operation that XLA does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x).median()


def test_an_operation_without_a_lowering_is_told_with_its_node() -> None:
    with pytest.raises(LoweringError) as caught:
        traced(Median, 2, 4, make_optimizer=adamw)
    assert str(caught.value.node.target) == "aten.median.default"


def test_a_model_too_large_for_this_machine_is_traced_in_little_memory() -> None:
    step = traced(lambda: nn.Linear(100_000, 100_000, bias=False), 8, 100_000, make_optimizer=adamw)
    assert step.parameters == 10**10


def test_small_state_of_one_kind_is_one_argument_on_one_chip() -> None:
    made = recipe(Net, optimizer)
    packed = trace(made, {"x": torch.empty((4, 3, 12, 12), device="meta")})
    plain = traced(Net, 4, 3, 12, 12, make_optimizer=optimizer)
    names = [argument.name for argument in packed.arguments]
    assert "params/conv.weight and 5 more" in names
    assert len(names) < len(plain.arguments)
    assert packed.parameters == plain.parameters
    total = sum(one.bytes for one in packed.arguments)
    assert total >= sum(one.bytes for one in plain.arguments)
