"""The training step of `openxla_step` as HLO, from a description of the model alone.

Owns: which argument of the program is which tensor of the state. No parameter is allocated;
tracing, sharing of equal state and the order of arguments are the backend's own.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runner.backends.base import Recipe
from runner.backends.step.function import StepFunction
from runner.backends.step.splice import trace_whole
from runner.backends.step.trace import fake_inputs
from runner.preflight.described import DescribedState, described_optimizer
from runner.preflight.origins import Origin, Origins, origin_of
from runner.xla import device
from runner.xla.placeholder import NumberedNodes, lower

_NODE = re.compile(r"node(\d+)\.\d+/")


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of the program.

    Attributes:
        name: Such as "params/0.weight", "optimizer/0.weight/exp_avg", "batch/image", "lr/0".
        shape: Its global shape.
        dtype: Such as "float32".
        bytes: Of all of it, on however many chips.
        donated: Whether the result that replaces it may have its memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    donated: bool

    @property
    def group(self) -> str:
        """The name's first part: "params", "buffers", "optimizer", "batch", "lr" or "seed"."""
        return self.name.partition("/")[0]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What an HLO operation was lowered from.

    Attributes:
        name: Such as "convolution".
        origin: Module and line.
    """

    name: str
    origin: Origin


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A training step, ready for a compiler.

    Attributes:
        hlo: A serialized `HloModuleProto`; operation names begin with `node<number>`.
        arguments: The program's arguments in order.
        results: Names of the program's results in order; state has the name of the argument
            that it replaces.
        operations: What the numbers in operation names stand for.
        nodes: Operations in the FX graph.
        parameters: Numbers in the model's parameters.
        trace_s: Seconds until there was an FX graph.
        lower_s: Seconds from there to HLO.
    """

    hlo: bytes
    arguments: list[Argument]
    results: list[str]
    operations: list[Operation]
    nodes: int
    parameters: int
    trace_s: float
    lower_s: float

    def operation(self, name: str) -> Operation | None:
        """What the operation of a name in `hlo` was lowered from; None for XLA's own."""
        found = _NODE.match(name)
        return self.operations[int(found[1])] if found else None


def trace(recipe: Recipe, batch: Mapping[str, Tensor]) -> TracedStep:
    """Traces and lowers a training step.

    Args:
        recipe: The step; of its model only names, shapes and types are read, so it may be on
            the "meta" device.
        batch: Tensors of the shapes and types of a batch, on any device.

    Raises:
        UntraceableStepError: The step cannot become one graph.
        RuntimeError: An operation cannot be lowered.
    """
    started = time.monotonic()
    target = device.open_device()
    with FakeTensorMode() as mode, DescribedState():
        model = without_data(recipe.model, mode).train()
        origins = Origins(model)
        described = dataclasses.replace(
            recipe,
            model=model,
            loss=origins.loss(recipe.loss),
            make_optimizer=described_optimizer(origins.optimizer(recipe.make_optimizer)),
        )
        function = StepFunction(described, device_type=target.type)
        equal = function.equal_scalars(function.initial)
        rates = [torch.zeros(()) for _ in range(function.groups)]
    function.batch_names = sorted(batch)
    values = [*function.initial, *rates, *(batch[name] for name in function.batch_names)]
    with origins.recorded():
        graph, merged = trace_whole(function, fake_inputs(values, target), equal=equal)
    traced_s = time.monotonic() - started
    names = _input_names(function)
    return _lowered(graph, values, names=names, merged=merged, trace_s=traced_s)


def without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a module whose parameters and buffers are fake tensors on the host."""
    memo: dict[int, Any] = {}
    with mode:
        for parameter in model.parameters():
            fake = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
            memo[id(parameter)] = fake
        for buffer in model.buffers():
            memo[id(buffer)] = _like(buffer)
    return copy.deepcopy(model, memo)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _input_names(function: StepFunction) -> list[str]:
    state = [f"{group}/{name}" for group, name in function.state_names]
    rates = [f"lr/{group}" for group in range(function.groups)]
    return [*state, *rates, *(f"batch/{name}" for name in function.batch_names)]


def _lowered(
    graph: fx.GraphModule,
    values: Sequence[Tensor],
    *,
    names: Sequence[str],
    merged: Mapping[int, int],
    trace_s: float,
) -> TracedStep:
    started = time.monotonic()
    numbered = NumberedNodes(graph)
    state = [i for i, name in enumerate(names) if name.partition("/")[0] in _STATE]
    kept = [i for i in state if i not in merged]
    step = lower(_kept_step(numbered, kept), values)
    arguments = _arguments(step.arguments, values, names=names)
    outputs = [*(names[i] for i in kept), "loss", "grad_norm"]
    results = {
        number: name
        for name, number in zip(outputs, step.results, strict=True)
        if number is not None
    }
    replaced = set(results.values())
    return TracedStep(
        hlo=step.hlo,
        arguments=[
            dataclasses.replace(argument, donated=argument.name in replaced)
            for argument in arguments
        ],
        results=[results[number] for number in range(len(results))],
        operations=[Operation(_op_name(node), origin_of(node)) for node in numbered.nodes],
        nodes=sum(node.op == "call_function" for node in numbered.nodes),
        parameters=sum(
            value.numel()
            for value, name in zip(values, names, strict=True)
            if name.startswith("params/")
        ),
        trace_s=trace_s,
        lower_s=time.monotonic() - started,
    )


_STATE = ("params", "buffers", "optimizer")


def _kept_step(graph: NumberedNodes, kept: Sequence[int]) -> Callable[..., list[Tensor | None]]:
    """A step as `openxla_step` runs it: merged state is neither read nor returned."""

    def run(*flat: Tensor, use_seed: Callable[[int], None]) -> list[Tensor | None]:
        use_seed(0)
        loss, norm, *new = graph.run(*flat)
        return [*(new[i] for i in kept), loss, norm]

    return run


def _arguments(
    numbers: Sequence[int | None], values: Sequence[Tensor], *, names: Sequence[str]
) -> list[Argument]:
    """The program's arguments; a number that no input has is the seed's."""
    found = {number: i for i, number in enumerate(numbers) if number is not None}
    count = max(found, default=-1) + 1
    return [
        _argument(names[found[number]], values[found[number]])
        if number in found
        else Argument("seed", (), "int64", 8, donated=False)
        for number in range(count)
    ]


def _argument(name: str, value: Tensor) -> Argument:
    size = math.prod(value.shape) * value.element_size()
    dtype = str(value.dtype).removeprefix("torch.")
    return Argument(name, tuple(value.shape), dtype, size, donated=False)


def _op_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return node.name
