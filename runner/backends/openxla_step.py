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
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from runner.backends.base import Backend, Batch, Metrics, Recipe
from runner.backends.compiles import CompileLog
from runner.backends.inplace import check_names, check_shape
from runner.backends.state import TrainState
from runner.backends.step.function import StepFunction
from runner.backends.step.splice import trace_whole
from runner.backends.step.trace import fake_inputs, trace_step
from runner.xla import counters, device
from runner.xla.program import Program, upload
from runner.xla.scan import scan_steps

Shapes = tuple[torch.Size, ...]
GROUPS = ("params", "buffers", "optimizer")


@dataclasses.dataclass(frozen=True)
class _Sharing:
    """Which carried tensors the program carries, and where each of all of them is among these.

    Attributes:
        kept: Positions, in the step's order, of the tensors that are carried.
        place: For every position in the step's order, the position among the kept.
    """

    kept: list[int]
    place: list[int]


class OpenXlaStep(Backend):
    """One program a call, `steps_per_call` updates a program.

    The model and the optimizer of the recipe stay on the host as templates; `publish` brings
    the state into them.
    """

    def __init__(self, recipe: Recipe, *, log: CompileLog, steps_per_call: int = 1) -> None:
        super().__init__(recipe, log=log, steps_per_call=steps_per_call)
        self.device = device.open_device()
        recipe.model.train()
        self._function = StepFunction(recipe, device_type=self.device.type)
        self._sharing: _Sharing | None = None
        self._carried: list[Tensor] = []
        self._host: list[Tensor] | None = self._function.initial
        self._programs: dict[Shapes, Program] = {}
        self._evaluations: dict[Shapes, tuple[Program, list[str]]] = {}
        # The last reference to an input waits for the program that reads it, so the inputs of
        # a call are let go three calls later, when the step clock has seen its end.
        self._inputs: collections.deque[list[Tensor]] = collections.deque(maxlen=3)

    def place(self, batch: Batch) -> dict[str, Tensor]:
        """See `Backend.place`."""
        return device.place(batch, self.device)

    def train_step(self, batch: Batch, *, step: int, lr: float) -> Metrics:
        """See `Backend.train_step`."""
        return self.train_steps([batch], step=step, lrs=[lr])

    def train_steps(self, batches: Sequence[Batch], *, step: int, lrs: Sequence[float]) -> Metrics:
        """See `Backend.train_steps`."""
        tensors = [batch[name] for batch in batches for name in self._names(batch)]
        shapes = tuple(tensor.shape for tensor in tensors)
        program = self._programs.get(shapes) or self._compile(tensors, shapes)
        inputs = [*self._carried, *self._rates(lrs), *tensors, *self._seeds(step, len(lrs))]
        outputs = program(inputs)
        count = len(self._carried)
        self._carried = outputs[:count]
        self._inputs.append(inputs)
        self.log.warmed("step")
        losses, norms = outputs[count:]
        return {"loss": losses, "grad_norm": norms}

    def _names(self, batch: Batch) -> list[str]:
        if not self._function.batch_names:
            self._function.batch_names = sorted(batch)
        return self._function.batch_names

    def _rates(self, lrs: Sequence[float]) -> list[Tensor]:
        scales = self._function.lr_scales
        if len(lrs) == 1:
            return [torch.tensor(lrs[0] * scale) for scale in scales]
        return [torch.tensor([lr * scale for lr in lrs]) for scale in scales]

    def _seeds(self, step: int, count: int) -> list[Tensor]:
        seeds = [self.recipe.step_seed(step + k) for k in range(count)]
        return [torch.tensor(seeds[0] if count == 1 else seeds)]

    def _compile(self, batch: Sequence[Tensor], shapes: Shapes) -> Program:
        with self.log.watch("step", batch, certain=True) as watch:
            one = batch[: len(batch) // self.steps_per_call]
            graph = self._trace(one)
            self._upload()
            watch.nodes = sum(node.op == "call_function" for node in graph.graph.nodes)
            watch.hash = hashlib.sha256(graph.code.encode()).hexdigest()[:16]
            self._programs[shapes] = self._bind(graph, batch)
        return self._programs[shapes]

    def _trace(self, batch: Sequence[Tensor]) -> fx.GraphModule:
        function = self._function
        values = self._values()
        rates = [torch.zeros(())] * function.groups
        inputs = fake_inputs([*function.initial, *rates, *batch], self.device)
        equal = function.equal_scalars(values) if self._sharing is None else self._shared_groups()
        graph, merged = trace_whole(function, inputs, equal=equal)
        if self._sharing is None:
            kept = [i for i in range(len(values)) if i not in merged]
            standing = {position: place for place, position in enumerate(kept)}
            place = [standing[merged.get(i, i)] for i in range(len(values))]
            self._sharing = _Sharing(kept, place)
        return graph

    def _shared_groups(self) -> list[list[int]]:
        assert self._sharing is not None
        groups: dict[int, list[int]] = collections.defaultdict(list)
        for position, place in enumerate(self._sharing.place):
            groups[place].append(position)
        return [group for group in groups.values() if len(group) > 1]

    def _upload(self) -> None:
        if self._host is not None:
            assert self._sharing is not None
            self._carried = upload([self._host[i] for i in self._sharing.kept])
            self._host = None

    def _bind(self, graph: fx.GraphModule, batch: Sequence[Tensor]) -> Program:
        assert self._sharing is not None
        steps, count = self.steps_per_call, len(self._carried)
        shape = () if steps == 1 else (steps,)
        rates = upload([torch.zeros(shape)] * self._function.groups)
        inputs = [*self._carried, *rates, *batch]
        if steps == 1:
            single = _single(graph, self._sharing)
            return Program(single, inputs, donate=range(count), seeds=1)
        seeds = upload([torch.zeros(steps, dtype=torch.int64)])
        looped = _looped(graph, self._sharing, groups=len(rates), steps=steps)
        return Program(looped, [*inputs, *seeds], donate=range(count))

    def eval_step(self, batch: Batch, mask: Tensor) -> Metrics:
        """See `Backend.eval_step`."""
        tensors = [*(batch[name] for name in self._names(batch)), mask]
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._evaluations:
            self._evaluations[shapes] = self._compile_evaluation(tensors)
        program, names = self._evaluations[shapes]
        inputs = [*self._all()[: len(self._function.names)], *tensors]
        metrics = dict(zip(names, program(inputs), strict=True))
        self._inputs.append(inputs)
        self.log.warmed("eval")
        return metrics

    def _compile_evaluation(self, batch: Sequence[Tensor]) -> tuple[Program, list[str]]:
        self._settle_sharing()
        function, model = self._function, self._all()[: len(self._function.names)]
        self.recipe.model.eval()
        with self.log.watch("eval", batch, certain=True) as watch, torch.no_grad():
            inputs = fake_inputs([*model, *batch], self.device)
            graph = trace_step(function.evaluate, inputs)
            watch.nodes = sum(node.op == "call_function" for node in graph.graph.nodes)
            watch.hash = hashlib.sha256(graph.code.encode()).hexdigest()[:16]
            program = Program(graph, [*model, *batch])
        self.recipe.model.train()
        return program, function.metric_names

    def _settle_sharing(self) -> None:
        """Without a training step there is nothing to prove equal: everything is carried."""
        if self._sharing is None:
            every = list(range(len(self._function.initial)))
            self._sharing = _Sharing(every, every)
        self._upload()

    def _all(self) -> list[Tensor]:
        if self._host is not None:
            return self._host
        assert self._sharing is not None
        return [self._carried[place] for place in self._sharing.place]

    def state(self, step: int) -> TrainState:
        """See `Backend.state`."""
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
        for (group, name), tensor in zip(self._function.state_names, self._all(), strict=True):
            groups[group][name] = tensor
        return TrainState(**groups, step=step)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Backend.to_host`."""
        return super().to_host(tensors) if self._host is not None else device.to_host(tensors)

    def load(self, state: TrainState) -> None:
        """See `Backend.load`.

        Raises:
            CheckpointError: Names or shapes differ from this model's and optimizer's.
        """
        own, saved = self.state(state.step).groups(), state.groups()
        for group, tensors in own.items():
            check_names(group, set(tensors), set(saved[group]))
            for name, tensor in tensors.items():
                check_shape(f"{group}/{name}", tensor, saved[group][name])
        names = self._function.state_names
        self._host = [saved[group][name].detach().cpu() for group, name in names]
        if self._sharing is not None and not self._still_equal(self._host):
            self._sharing = None
            self._programs.clear()
        if self._programs:
            self._upload()

    def _still_equal(self, values: Sequence[Tensor]) -> bool:
        return all(
            torch.equal(values[group[0]], values[other])
            for group in self._shared_groups()
            for other in group[1:]
        )

    def publish(self) -> tuple[nn.Module, Optimizer]:
        """The recipe's model and its optimizer on the host, brought up to the state.

        sync: waits for the last step. The learning rates of the groups are not part of it.
        """
        self._function.publish(self._values())
        return self.recipe.model, self._function.functional.optimizer

    def _values(self) -> list[Tensor]:
        return self._host if self._host is not None else device.to_host(self._all())

    def programs(self) -> int:
        """See `Backend.programs`."""
        return counters.programs()

    @staticmethod
    def compile_totals() -> tuple[int, float]:
        """See `Backend.compile_totals`."""
        return counters.compiles()

    def memory_bytes(self) -> int:
        """See `Backend.memory_bytes`."""
        return device.memory_bytes(self.device) or super().memory_bytes()


def _single(graph: fx.GraphModule, sharing: _Sharing) -> Callable[..., Any]:
    """A call of one step: from kept state and inputs to kept state, loss, norm."""
    count = len(sharing.kept)

    def run(*flat: Tensor, use_seed: Callable[[int], None]) -> list[Tensor | None]:
        use_seed(0)
        full = [flat[place] for place in sharing.place]
        loss, norm, *new = graph(*full, *flat[count:])
        return [*(new[i] for i in sharing.kept), loss, norm]

    return run


def _looped(
    graph: fx.GraphModule, sharing: _Sharing, *, groups: int, steps: int
) -> Callable[..., Any]:
    """A call of several steps: a loop on the device over rates, stacked batches and seeds."""
    count = len(sharing.kept)

    def body(
        carry: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        full = [carry[place] for place in sharing.place]
        loss, norm, *new = graph(*full, *inputs)
        return [new[i] for i in sharing.kept], [loss, norm]

    def run(*flat: Tensor) -> list[Tensor]:
        rates, rest, seeds = flat[count : count + groups], flat[count + groups : -1], flat[-1]
        width = len(rest) // steps
        stacked = [torch.stack(rest[i::width]) for i in range(width)]
        carry, outputs = scan_steps(body, flat[:count], inputs=[*rates, *stacked], seeds=seeds)
        return [*carry, *outputs]

    return run
