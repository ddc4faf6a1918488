"""The whole training step as one compiled program; the default for training.

Forward, loss, backward, clipping and optimizer are traced once to one functional graph and
compiled to one XLA program that is given the buffers of the state it replaces. A call is one
program; what the host does for it is to line up the arguments.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from runner.backends.base import Backend, Batch, Metrics, Recipe
from runner.backends.compiles import CompileLog
from runner.backends.inplace import check_names, check_shape
from runner.backends.passes.pipeline import for_cpu
from runner.backends.placement import open_placement, partitions_of
from runner.backends.sharding import ONE_DEVICE, Partition, Sharding
from runner.backends.snapshot import Snapshot
from runner.backends.state import TrainState
from runner.backends.step.cpu_norms import norms_for
from runner.backends.step.function import StepFunction
from runner.backends.step.host import HostNumbers
from runner.backends.step.labels import Labels, Unlabelled
from runner.backends.step.layout import Layout
from runner.backends.step.placed import PlacedBatch
from runner.backends.step.splice import trace_whole
from runner.backends.step.stacks import apart, partitions, pieces_apart, together
from runner.backends.step.trace import fake_inputs, trace_step
from runner.xla import counters, device
from runner.xla.pin import pinned_by
from runner.xla.program import Program
from runner.xla.scan import operations, scan

Shapes = tuple[torch.Size, ...]
Pin = Callable[[list[Tensor]], list[Tensor]]


class OpenXlaStep(Backend):
    """One program a call, `steps_per_call` updates a program.

    The model and the optimizer of the recipe stay on the host as templates; `publish` brings
    the state into them.

    Args:
        recipe: What to compute.
        log: Where compiled graphs are recorded.
        steps_per_call: Updates that one call makes.
        labelled: Whether the operations of the step's program bear the names of the modules
            that they come from, for a profile. Tracing takes longer, the program is the same.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        log: CompileLog,
        steps_per_call: int = 1,
        labelled: bool = False,
        sharding: Sharding = ONE_DEVICE,
    ) -> None:
        scanned = recipe.scan_layers
        self._labels = Labels(recipe.model, scanned=scanned) if labelled else Unlabelled()
        super().__init__(self._labels.on(recipe), log=log, steps_per_call=steps_per_call)
        self._placement = open_placement(sharding)
        self.device = self._placement.device
        if device.is_cpu():
            self.recipe = dataclasses.replace(self.recipe, passes=for_cpu(recipe.passes))
        recipe.model.train()
        self._function = StepFunction(
            self.recipe,
            device_type=self.device.type,
            decomposed=norms_for(sharding),
            mesh=sharding.mesh,
        )
        shapes = [tensor.shape for tensor in self._function.initial]
        self._partitions = partitions(self._function.carried, shapes, sharding)
        self._shares = [sharding.parts(partition) for partition in self._partitions]
        self._function.pack = max(self._shares, default=1) == 1
        self._layout: Layout | None = None
        self._carried: list[Tensor] = []
        self._host: list[Tensor] | None = self._function.initial
        self._programs: dict[Shapes, Program] = {}
        self._evaluations: dict[Shapes, tuple[Program, list[str]]] = {}
        # The last reference to an input waits for the program that reads it, so the inputs of
        # a call, with the updates after it, stay until its end was seen; or, where nobody tells
        # of ends, for three calls.
        self._inputs: collections.deque[tuple[int, list[Tensor]]] = collections.deque(maxlen=3)
        self._lrs: list[float] = []
        self._rate: list[Tensor] = []
        groups = range(self._function.groups)
        self._rate_numbers = [HostNumbers(steps_per_call) for _ in groups]
        self._seed_numbers = HostNumbers(steps_per_call, whole=True)
        self._unread = self._placement.inputs([torch.tensor(0)])

    def place(self, batch: Batch) -> PlacedBatch:
        """See `Backend.place`."""
        return PlacedBatch(batch, self._placement.place(batch))

    def train_step(self, batch: Batch, *, step: int, lr: float) -> Metrics:
        """See `Backend.train_step`."""
        return self.train_steps([batch], step=step, lrs=[lr])

    def train_steps(self, batches: Sequence[Batch], *, step: int, lrs: Sequence[float]) -> Metrics:
        """See `Backend.train_steps`."""
        tensors, program = self._program(batches)
        seeds = self._seeds(program, step=step, count=len(lrs))
        inputs = [*self._carried, *self._rates(lrs), *tensors, *seeds]
        outputs = program(inputs)
        norms, losses = outputs.pop(), outputs.pop()
        self._carried = outputs
        self._inputs.append((step + len(lrs), inputs))
        return {"loss": losses, "grad_norm": norms}

    def ended(self, step: int) -> None:
        """See `Backend.ended`: lets go of the wrappers of the state before, and of the batch."""
        inputs = self._inputs
        while inputs and inputs[0][0] <= step:
            inputs.popleft()

    def prepare(self, batches: Sequence[Batch]) -> None:
        """See `Backend.prepare`: what the step proves of the state decides how it is laid out."""
        self._program(batches)

    def _program(self, batches: Sequence[Batch]) -> tuple[list[Tensor], Program]:
        """The tensors of these batches, and the program that takes them."""
        first, *others = cast("Sequence[PlacedBatch]", batches)
        tensors, shapes = first.tensors, first.shapes
        for batch in others:
            tensors = tensors + batch.tensors
            shapes += batch.shapes
        program = self._programs.get(shapes)
        if program is None:
            self._names(batches[0])
            program = self._compile(tensors, shapes)
        return tensors, program

    def _names(self, batch: Batch) -> list[str]:
        if not self._function.batch_names:
            self._function.batch_names = sorted(batch)
        return self._function.batch_names

    def _rates(self, lrs: Sequence[float]) -> list[Tensor]:
        """The rate of each group; written again only when it changes."""
        if lrs != self._lrs:
            scales = self._function.lr_scales
            self._rate = self._placement.inputs(
                [
                    numbers([lr * scale for lr in lrs])
                    for numbers, scale in zip(self._rate_numbers, scales, strict=True)
                ]
            )
            self._lrs = list(lrs)
        return self._rate

    def _seeds(self, program: Program, *, step: int, count: int) -> list[Tensor]:
        if count == 1 and not program.draws:
            return self._unread
        seeds = self._seed_numbers([self.recipe.step_seed(step + k) for k in range(count)])
        return self._placement.inputs([seeds])

    def _compile(self, batch: Sequence[Tensor], shapes: Shapes) -> Program:
        with self.log.watch("step", batch, certain=True) as watch:
            one = batch[: len(batch) // self.steps_per_call]
            graph = self._trace(one)
            self._upload()
            watch.passes = self._function.passes.made
            watch.nodes = operations(graph.graph)
            watch.hash = hashlib.sha256(graph.code.encode()).hexdigest()[:16]
            with self._labels.lowered(graph) as run, pinned_by(self._placement.pinned):
                self._programs[shapes] = self._bind(run, batch)
        self.log.warmed("step")
        return self._programs[shapes]

    def _trace(self, batch: Sequence[Tensor]) -> fx.GraphModule:
        function = self._function
        values = self._values()
        rates = [torch.zeros(())] * function.groups
        inputs = fake_inputs([*function.initial, *rates, *batch], self.device)
        known = self._layout
        equal = function.equal_scalars(values) if known is None else known.equal_groups()
        # The recorder above the rewrites, which would keep the taking of gradients from it.
        with function.passes.rewriting(), self._labels.traced():
            graph, merged = trace_whole(function, inputs, equal=equal)
        self._layout = known or Layout(values, merged=merged, roles=function.roles)
        return graph

    def _upload(self) -> None:
        if self._host is not None:
            assert self._layout is not None
            buffers = self._layout.pack(self._host)
            self._carried = self._placement.upload(buffers, self._lying())
            self._host = None

    def _lying(self) -> list[Partition]:
        """How every buffer lies on the devices."""
        assert self._layout is not None
        return partitions_of(self._layout.held, self._partitions)

    def _pin(self, buffers: list[Tensor]) -> list[Tensor]:
        """New buffers, made to lie as those that they replace."""
        self._placement.pin(buffers, self._lying())
        return buffers

    def _bind(self, graph: Callable[..., Any], batch: Sequence[Tensor]) -> Program:
        assert self._layout is not None
        steps, count = self.steps_per_call, len(self._carried)
        shape = () if steps == 1 else (steps,)
        rates = self._upload_zeros(shape, count=self._function.groups, dtype=torch.float32)
        inputs = [*self._carried, *rates, *batch]
        if steps == 1:
            single = _single(graph, self._layout, pin=self._pin)
            return Program(single, inputs, donate=range(count), seeds=1)
        seeds = self._upload_zeros(shape, count=1, dtype=torch.int64)
        looped = _looped(graph, self._layout, groups=len(rates), steps=steps, pin=self._pin)
        return Program(looped, [*inputs, *seeds], donate=range(count))

    def _upload_zeros(
        self, shape: tuple[int, ...], *, count: int, dtype: torch.dtype
    ) -> list[Tensor]:
        whole = ((),) * len(shape)
        return self._placement.upload([torch.zeros(shape, dtype=dtype)] * count, [whole] * count)

    def eval_step(self, batch: Batch, mask: Tensor) -> Metrics:
        """See `Backend.eval_step`."""
        tensors = [*(batch[name] for name in self._names(batch)), mask]
        shapes = tuple(tensor.shape for tensor in tensors)
        known = self._evaluations.get(shapes) or self._compile_evaluation(tensors, shapes)
        program, names = known
        inputs = [*self._carried, *tensors]
        metrics = dict(zip(names, program(inputs), strict=True))
        self._inputs.append((0, inputs))
        self.log.warmed("eval")
        return metrics

    def _compile_evaluation(
        self, batch: Sequence[Tensor], shapes: Shapes
    ) -> tuple[Program, list[str]]:
        layout, function = self._settle_layout(), self._function
        count = len(function.names)
        self.recipe.model.eval()
        with self.log.watch("eval", batch, certain=True) as watch, torch.no_grad():
            inputs = fake_inputs([*function.initial[:count], *batch], self.device)
            with function.passes.rewriting():
                graph = trace_step(function.evaluate, inputs, decomposed=function.decomposed)
            function.passes.improve(graph)
            watch.passes = function.passes.made
            watch.nodes = operations(graph.graph)
            watch.hash = hashlib.sha256(graph.code.encode()).hexdigest()[:16]
            with pinned_by(self._placement.pinned):
                program = Program(_reading(graph, layout, count=count), [*self._carried, *batch])
        self.recipe.model.train()
        self._evaluations[shapes] = program, function.metric_names
        return self._evaluations[shapes]

    def _settle_layout(self) -> Layout:
        """Without a training step there is nothing to prove equal: everything is carried."""
        if self._layout is None:
            function = self._function
            self._layout = Layout(function.initial, merged={}, roles=function.roles)
        self._upload()
        return self._layout

    def state(self, step: int) -> TrainState:
        """The state after `step` updates, on the host.

        sync: waits until the step has ended.
        """
        return TrainState(**apart(self._function.carried, self._values()), step=step)

    def snapshot(self, step: int) -> Snapshot:
        """See `Backend.snapshot`; what is cut over devices stays in its pieces.

        sync: waits until the step has ended.
        """
        if self._host is not None or max(self._shares, default=1) == 1:
            return super().snapshot(step)
        assert self._layout is not None
        held = self._placement.host_tensors(self._carried)
        groups = pieces_apart(self._function.carried, self._layout.apart(held))
        named = {f"{g}/{name}": t for g, own in groups.items() for name, t in own.items()}
        return Snapshot(step, named)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Backend.to_host`; what `state` fetched from the device is a copy already."""
        return super().to_host(tensors) if self._host is not None else list(tensors)

    def load(self, state: TrainState) -> None:
        """See `Backend.load`.

        Raises:
            CheckpointError: Names or shapes differ from this model's and optimizer's.
        """
        carried, saved = self._function.carried, state.groups()
        own = apart(carried, self._function.initial)
        for group, tensors in own.items():
            check_names(group, set(tensors), set(saved[group]))
            for name, tensor in tensors.items():
                check_shape(f"{group}/{name}", tensor, saved[group][name])
        self._host = [tensor.detach().cpu() for tensor in together(carried, saved)]
        if self._layout is not None and not self._still_equal(self._layout, self._host):
            self._layout = None
            self._programs.clear()
            self._evaluations.clear()
        if self._programs:
            self._upload()

    @staticmethod
    def _still_equal(layout: Layout, values: Sequence[Tensor]) -> bool:
        return all(
            torch.equal(values[first], values[other])
            for first, *others in layout.equal_groups()
            for other in others
        )

    def publish(self) -> tuple[nn.Module, Optimizer]:
        """The recipe's model and its optimizer on the host, brought up to the state.

        sync: waits for the last step. The learning rates of the groups are not part of it.
        """
        return self.recipe.model, self._function.publish(self._values())

    def _values(self) -> list[Tensor]:
        """All carried tensors on the host; not to be changed."""
        if self._host is not None:
            return self._host
        assert self._layout is not None
        return self._layout.unpack(self._placement.to_host(self._carried))

    def programs(self) -> int:
        """See `Backend.programs`."""
        return counters.programs()

    @staticmethod
    def compile_totals() -> tuple[int, float]:
        """See `Backend.compile_totals`."""
        return counters.compiles()

    def memory_bytes(self) -> int:
        """See `Backend.memory_bytes`."""
        rows = self._layout.held if self._layout else [[i] for i in range(len(self._shares))]
        return device.memory_bytes(self.device) or sum(
            self._function.initial[i].nbytes // self._shares[i] for row in rows for i in row
        )


def _single(graph: Callable[..., Any], layout: Layout, *, pin: Pin) -> Callable[..., Any]:
    """A call of one step: from buffers and inputs to buffers, loss, norm."""
    count = len(layout)

    def run(*flat: Tensor, use_seed: Callable[[int], None]) -> list[Tensor]:
        use_seed(0)
        loss, norm, *new = graph(*layout.unpack(flat[:count]), *flat[count:])
        return [*pin(layout.pack(new)), loss, norm]

    return run


def _looped(
    graph: Callable[..., Any], layout: Layout, *, groups: int, steps: int, pin: Pin
) -> Callable[..., Any]:
    """A call of several steps: a loop on the device over rates, stacked batches and seeds."""
    count = len(layout)

    def body(
        carry: Sequence[Tensor], inputs: Sequence[Tensor], _: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        loss, norm, *new = graph(*layout.unpack(carry), *inputs)
        return layout.pack(new), [loss, norm]

    def run(*flat: Tensor) -> list[Tensor]:
        rates, rest, seeds = flat[count : count + groups], flat[count + groups : -1], flat[-1]
        width = len(rest) // steps
        stacked = [torch.stack(rest[i::width]) for i in range(width)]
        carry, outputs = scan(body, flat[:count], inputs=[*rates, *stacked], seeds=seeds)
        return [*pin(carry), *outputs]

    return run


def _reading(graph: fx.GraphModule, layout: Layout, *, count: int) -> Callable[..., Any]:
    """An evaluation: it reads the first `count` tensors, those of the model."""
    held = len(layout)

    def run(*flat: Tensor) -> Any:
        return graph(*layout.unpack(flat[:held])[:count], *flat[held:])

    return run
