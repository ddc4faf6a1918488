"""Layers that repeat as two loops on the device: one forward, one back.

The program has one layer's operations however many there are. The way forward keeps each layer's
input and what it drew at random; the way back computes the inside again: kept through a loop, all
insides would be written to memory. Source: `jax.lax.scan` with `jax.checkpoint`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from runner.backends.passes.pipeline import Passes
from runner.backends.step.alike import refuse_unlike
from runner.backends.step.cpu_norms import Decompositions
from runner.backends.step.layers import Call, LayerFunction, named_tensors
from runner.backends.step.trace import StepFn, trace_unwritten
from runner.record.errors import ConfigError
from runner.xla.scan import ScanBody, scan_body, scanned

_SEEDS = 2**62


class Scan:
    """Runs layers as loops.

    Args:
        passes: What is done to a layer's graph.
        decomposed: What is written out in other operations: see `trace_step`.
        lie: See `Activations.lie`.
    """

    def __init__(
        self,
        passes: Passes,
        *,
        decomposed: Decompositions,
        lie: Callable[[Tensor], Tensor],
    ) -> None:
        self.passes, self._decomposed, self.lie = passes, decomposed, lie
        self._lying: dict[int, tuple[Tensor, int]] = {}
        # A body is known by its name, which stays in the graph, while it is kept.
        self._bodies: set[ScanBody] = set()

    def hold(self, stacks: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
        """Tells which tensors are the slices, in order, of which stack: [layers, ...]."""
        self._held = stacks  # alive, so that no other tensor gets a slice's id
        self._lying = {
            id(one): (stack, place) for stack, slices in stacks for place, one in enumerate(slices)
        }

    def __call__(
        self, call: Call, layers: Sequence[nn.Module], x: Tensor, *shared: Tensor
    ) -> Tensor:
        """The last layer's output: see `jobs.stack.run_layers`.

        Raises:
            ConfigError: The layers do not all compute the same, or one changes a buffer.
        """
        if not layers:
            return x
        own = [named_tensors(layer) for layer in layers]
        stacks = [self._stack([tensors[name] for tensors in own]) for name in own[0]]
        loops = _Loops(self, call, layers, x, shared, stacks)
        output: Tensor = _Scanned.apply(loops, x, *shared, *stacks)  # type: ignore[no-untyped-call]
        return output

    def body(self, function: StepFn, examples: Sequence[Tensor], *, carried: int) -> ScanBody:
        """A loop's body, traced apart from the step that the loop is part of."""
        with _apart():
            graph = trace_unwritten(function, examples, decomposed=self._decomposed)
        self.passes.improve(graph)
        body = scan_body(graph, carried=carried)
        self._bodies.add(body)
        return body

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The stack that tensors lie in; if they do not, one that is made of them."""
        found = [self._lying.get(id(tensor)) for tensor in tensors]
        first = found[0]
        if first is not None:
            stack, start = first
            places = [place for own, place in filter(None, found) if own is stack]
            if places == list(range(start, start + len(tensors))):
                return stack if len(places) == len(stack) else stack[start : places[-1] + 1]
        return torch.stack(list(tensors))


class _Loops:
    """The loops of a stack of layers.

    Attributes:
        shared: How many inputs are the same for every layer.
        drawn: How many tensors a layer draws at random.
        reached: Of the stacks that want gradients, whether they have any.
    """

    def __init__(
        self,
        scan: Scan,
        call: Call,
        layers: Sequence[nn.Module],
        x: Tensor,
        shared: Sequence[Tensor],
        stacks: Sequence[Tensor],
    ) -> None:
        self._scan, self._call, self._layers = scan, call, layers
        self.shared, self.drawn = len(shared), 0
        self.reached: list[bool] = []
        self._drawn_as: pytree.TreeSpec | None = None
        self._function: LayerFunction | None = None
        with _apart(), FakeTensorMode():
            self._x = _like(x, x.shape)
            self._stacked = [_like(stack, stack.shape[1:]) for stack in stacks]
            self._constants = [_like(one, one.shape) for one in shared]

    def forward(self, *, keep: bool) -> ScanBody:
        """From a layer's input to its output; each layer's input and draws put out with `keep`."""
        examples = [self._x, *self._stacked, *self._constants]

        def traced(layer: nn.Module, *, keep: bool) -> ScanBody:
            function = LayerFunction(self._call, layer, self._scan.passes.parameters)
            self._function = function

            def run(x: Tensor, *rest: Tensor) -> list[Tensor]:
                own = rest[: len(rest) - self.shared]
                self._scan.passes.parameters.also(own)
                x = self._scan.lie(x)
                output = function.first([x, *rest[len(own) :], *own])
                if (output.shape, output.dtype) != (x.shape, x.dtype):
                    raise ConfigError(
                        f"scan_layers must be false with layers whose output is not as their input:"
                        f" {function.kind} makes {_kind(output)} of {_kind(x)}; got true"
                    )
                drawn, self._drawn_as = pytree.tree_flatten(function.drawn)
                self.drawn = len(drawn)
                return [output, *([x, *drawn] if keep else [])]

            return self._scan.body(run, examples, carried=1)

        refuse_unlike(self._layers, lambda layer: traced(layer, keep=False).name)
        return traced(self._layers[0], keep=keep)

    def backward(self, drawn: Sequence[Tensor], wanted: Sequence[bool]) -> ScanBody:
        """From the gradient of a layer's output, and the sums of those of `shared`, to the next.

        Args:
            drawn: Of all layers.
            wanted: Of `shared`, then of the stacks, whether they have gradients.
        """
        with _apart(), FakeTensorMode():
            each = [_like(one, one.shape[1:]) for one in drawn]
        sums = [one for one, asked in zip(self._constants, wanted, strict=False) if asked]
        examples = [self._x, *sums, self._x, *each, *self._stacked, *self._constants]
        assert self._function is not None
        function = self._function

        def run(gradient: Tensor, *rest: Tensor) -> list[Tensor]:
            before, (x, *rows) = rest[: len(sums)], rest[len(sums) :]
            drawn, rows = rows[: len(each)], rows[len(each) :]
            own, shared = rows[: len(self._stacked)], rows[len(self._stacked) :]
            gradient, x = self._scan.lie(gradient), self._scan.lie(x)
            leaves = [x.detach().requires_grad_()]
            for tensor, asked in zip([*shared, *own], wanted, strict=True):
                leaves.append(tensor.detach().requires_grad_(asked))
            assert self._drawn_as is not None
            again = pytree.tree_unflatten([_plain(one) for one in drawn], self._drawn_as)
            output = function.again(leaves, drawn=again)
            first, *found = function.gradients(output, leaves, gradient)
            asked_for = [new for new, asked in zip(found, wanted, strict=True) if asked]
            of_shared, of_own = asked_for[: len(sums)], asked_for[len(sums) :]
            self.reached = [new is not None for new in of_own]
            added = [
                old if new is None else old + new
                for old, new in zip(before, of_shared, strict=True)
            ]
            last = torch.zeros_like(x) if first is None else first
            return [last, *added, *(new for new in of_own if new is not None)]

        return self._scan.body(run, examples, carried=1 + len(sums))


class _Scanned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loops: _Loops, x: Tensor, *tensors: Tensor) -> Tensor:
        shared, stacks = list(tensors[: loops.shared]), list(tensors[loops.shared :])
        keep = any(ctx.needs_input_grad)
        body = loops.forward(keep=keep)
        seeds = None
        if loops.drawn:
            seeds = torch.randint(_SEEDS, (len(stacks[0]),), dtype=torch.int64, device=x.device)
        (output,), kept = scanned(body, [x], inputs=stacks, constants=shared, seeds=seeds)
        if keep:
            ctx.loops, ctx.drawn = loops, len(kept) - 1
            ctx.save_for_backward(*kept, *stacks, *shared)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        loops, wanted = ctx.loops, ctx.needs_input_grad[2:]
        rows = list(ctx.saved_tensors)
        inputs, shared = rows[: len(rows) - loops.shared], rows[len(rows) - loops.shared :]
        body = loops.backward(inputs[1 : 1 + ctx.drawn], wanted)
        sums = [torch.zeros_like(one) for one, asked in zip(shared, wanted, strict=False) if asked]
        (first, *of_shared), of_stacks = scanned(
            body, [*gradients, *sums], inputs=inputs, constants=shared, reverse=True
        )
        reached = iter(of_stacks)
        found = iter([*of_shared, *(next(reached) if one else None for one in loops.reached)])
        rest = [next(found) if asked else None for asked in wanted]
        return None, first if ctx.needs_input_grad[1] else None, *rest


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Out of the trace that is under way, so that another can begin."""
    with _disable_current_modes():
        torch._disable_functionalization()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            torch._enable_functionalization(reapply_views=True)


def _plain(tensor: Tensor) -> Tensor:
    """A tensor as the modes below functionalization know it."""
    found: Tensor = torch._from_functional_tensor(tensor)
    return found


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
