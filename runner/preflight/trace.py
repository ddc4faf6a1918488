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
from runner.backends.placement import partitions_of
from runner.backends.sharding import ONE_DEVICE, Partition, Sharding
from runner.backends.step.function import StepFunction
from runner.backends.step.layout import Layout
from runner.backends.step.origins import Origin, Origins, origin_of
from runner.backends.step.splice import trace_whole
from runner.backends.step.stacks import partitions
from runner.backends.step.trace import fake_inputs, in_haste
from runner.config.parallel import Mesh
from runner.preflight.described import DescribedState, described_optimizer
from runner.preflight.layout import op_sharding
from runner.xla import device
from runner.xla.flash_attention import model_flops
from runner.xla.pin import Pinner, pinned_by
from runner.xla.placeholder import NumberedNodes, custom_call, lower
from runner.xla.scan import operations

_NODES = re.compile(r"(?:node(\d+)\.\d+/)+")


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of the program.

    Attributes:
        name: Such as "params/0.weight", "optimizer/0.weight/exp_avg", "batch/image", "lr/0".
        shape: Its global shape.
        dtype: Such as "float32".
        bytes: Of all of it, on however many chips.
        donated: Whether the result that replaces it may have its memory.
        partition: How it lies on the mesh.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    donated: bool
    partition: Partition = ()

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
        kernel_flops: What a kernel computes, without what it computes again; 0 of others.
    """

    name: str
    origin: Origin
    kernel_flops: float = 0.0


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
        passes: What the passes changed: name of a pass to how often.
    """

    hlo: bytes
    arguments: list[Argument]
    results: list[str]
    operations: list[Operation]
    nodes: int
    parameters: int
    trace_s: float
    lower_s: float
    passes: Mapping[str, int]

    def operation(self, name: str) -> Operation | None:
        """What the operation of a name in `hlo` was lowered from; None for XLA's own.

        The name of one in a loop begins with the loop's node.
        """
        found = _NODES.match(name)
        return self.operations[int(found[1])] if found else None


@in_haste()
def trace(
    recipe: Recipe, batch: Mapping[str, Tensor], *, sharding: Sharding = ONE_DEVICE
) -> TracedStep:
    """Traces and lowers a training step.

    Args:
        recipe: The step; of its model only names, shapes and types are read, so it may be on
            the "meta" device.
        batch: Tensors of the shapes and types of a batch, on any device.
        sharding: How the step's tensors are to lie.

    Raises:
        ConfigError: A sharding rule of the job does not fit its parameter.
        UntraceableStepError: The step cannot become one graph.
        RuntimeError: An operation cannot be lowered.
    """
    started = time.monotonic()
    target = device.open_device()
    with FakeTensorMode() as mode, DescribedState():
        model = without_data(recipe.model, mode).train()
        origins = Origins(model, scanned=recipe.scan_layers)
        described = dataclasses.replace(
            recipe,
            model=model,
            loss=origins.loss(recipe.loss),
            make_optimizer=described_optimizer(origins.optimizer(recipe.make_optimizer)),
        )
        function = StepFunction(described, device_type=target.type, mesh=sharding.mesh)
        equal = function.equal_scalars(function.initial)
        rates = [torch.zeros(()) for _ in range(function.groups)]
    shapes = [one.shape for one in function.initial]
    carried = partitions(function.carried, shapes, sharding)
    function.pack = not any(sharding.parts(partition) > 1 for partition in carried)
    function.batch_names = sorted(batch)
    values = [*function.initial, *rates, *(batch[name] for name in function.batch_names)]
    # The recorder above the rewrites: what a user's call becomes has that call's origin.
    with function.passes.rewriting(), origins.recorded():
        graph, merged = trace_whole(function, fake_inputs(values, target), equal=equal)
        layout = Layout(function.initial, merged=merged, roles=function.roles)
    held = partitions_of(layout.held, carried)
    inputs = _Inputs(function, values, layout, held=held, sharding=sharding)
    with pinned_by(_pinner(sharding.mesh)):
        step = _lowered(graph, inputs, trace_s=time.monotonic() - started)
    return dataclasses.replace(step, passes=function.passes.made)


def _pinner(mesh: Mesh) -> Pinner:
    """Pins as the partitioner reads them: see `runner.preflight.tpu_compiler.stablehlo`."""

    def pinner(x: Tensor, axes: tuple[str, ...]) -> Tensor:
        lying = op_sharding(mesh, (axes, *(() for _ in x.shape[1:])))
        return custom_call("Sharding", x, text=lying)

    return pinner


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


class _Inputs:
    """The program's inputs: buffers of the state, rates, batch.

    Attributes:
        names: A name for each; a buffer of several tensors bears that of the first.
        values: Tensors of their shapes and types.
        partitions: How each lies on the mesh.
        layout: How the state lies in its buffers.
        parameters: Numbers in the model's parameters.
    """

    def __init__(
        self,
        function: StepFunction,
        values: Sequence[Tensor],
        layout: Layout,
        *,
        held: Sequence[Partition],
        sharding: Sharding,
    ) -> None:
        self.layout = layout
        count = len(function.initial)
        names = [f"{one.group}/{one.name}" for one in function.carried]
        rates = [f"lr/{group}" for group in range(function.groups)]
        batch = [f"batch/{name}" for name in function.batch_names]
        self.names = [*(_together([names[i] for i in held]) for held in layout.held)]
        self.names += [*rates, *batch]
        self.values = [*layout.pack(values[:count]), *values[count:]]
        data = values[count + len(rates) :]
        self.partitions = [*held, *(() for _ in rates), *(sharding.batch(v.shape) for v in data)]
        named = zip(names, values[:count], strict=True)
        self.parameters = sum(value.numel() for name, value in named if name.startswith("params/"))

    def argument(self, number: int) -> Argument:
        """The argument that an input is, if the program reads it."""
        value = self.values[number]
        size = math.prod(value.shape) * value.element_size()
        dtype = str(value.dtype).removeprefix("torch.")
        return Argument(
            self.names[number],
            tuple(value.shape),
            dtype,
            size,
            donated=False,
            partition=self.partitions[number],
        )


def _together(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _lowered(graph: fx.GraphModule, inputs: _Inputs, *, trace_s: float) -> TracedStep:
    started = time.monotonic()
    numbered, count = NumberedNodes(graph), len(inputs.layout)
    step = lower(_buffered(numbered, inputs.layout), inputs.values)
    outputs = [*inputs.names[:count], "loss", "grad_norm"]
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
            for argument in _arguments(step.arguments, inputs)
        ],
        results=[results[number] for number in range(len(results))],
        operations=[
            Operation(_op_name(node), origin_of(node), model_flops(node)) for node in numbered.nodes
        ],
        nodes=operations(graph.graph),
        parameters=inputs.parameters,
        trace_s=trace_s,
        lower_s=time.monotonic() - started,
        passes={},
    )


def _buffered(graph: NumberedNodes, layout: Layout) -> Callable[..., list[Tensor | None]]:
    """A step as `openxla_step` runs it: from buffers to buffers."""
    count = len(layout)

    def run(*flat: Tensor, use_seed: Callable[[int], None]) -> list[Tensor | None]:
        use_seed(0)
        loss, norm, *new = graph.run(*layout.unpack(flat[:count]), *flat[count:])
        return [*layout.pack(new), loss, norm]

    return run


def _arguments(numbers: Sequence[int | None], inputs: _Inputs) -> list[Argument]:
    """The program's arguments; a number that no input has is the seed's."""
    found = {number: i for i, number in enumerate(numbers) if number is not None}
    count = max(found, default=-1) + 1
    return [
        inputs.argument(found[number])
        if number in found
        else Argument("seed", (), "int64", 8, donated=False)
        for number in range(count)
    ]


def _op_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return node.name
