"""Tensors without data, and the HLO of a graph over them: no parameter is allocated.

Source: `LoweringContext` (torch_xla 2.9.0).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from runner.xla.autocast import switched_off
from runner.xla.binding import binding
from runner.xla.program import OutputPlan, numbers_as_constants
from runner.xla.scan import all_nodes, placeholder
from runner.xla.scopes import ScopedNodes, named_operations

Graph = Callable[..., Sequence["Tensor | None"]]
_SEED_MARK = 1


class LoweringError(Exception):
    """XLA has no such operation, or not with such arguments.

    Args:
        node: What was to be lowered.
        reason: torch_xla's own words.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.target}: {reason}")
        self.node = node
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A graph as HLO.

    Attributes:
        hlo: A serialized `HloModuleProto`. The name of an operation begins with the number
            that `node_number` gives to the FX node that it was made of.
        arguments: For each input its argument number, or None if the graph does not read it.
        results: For each output its result number; None for one that is an input unchanged.
    """

    hlo: bytes
    arguments: list[int | None]
    results: list[int | None]


def lower(graph: Graph, inputs: Sequence[Tensor]) -> Lowered:
    """Lowers a functional graph to HLO.

    Args:
        graph: Called with XLA tensors and, for random operations, `use_seed`, as by
            `runner.xla.program.Program`.
        inputs: Tensors whose shapes and types are taken.

    Raises:
        LoweringError: An operation cannot be lowered.
    """
    places = [placeholder(tensor.shape, tensor.dtype) for tensor in inputs]
    named = named_operations()
    with _nothing_runs(), named, numbers_as_constants(), torch.no_grad(), switched_off():
        outputs = list(graph(*places, use_seed=_use_seed))
        plan = OutputPlan(outputs, places)
        context = binding.lowering.LoweringContext("step")
        context.build(plan.results)
    numbers = [context.tensor_parameter_id(place) for place in places]
    return Lowered(
        hlo=context.hlo(),
        arguments=[None if number < 0 else number for number in numbers],
        results=[index if kind == "result" else None for kind, index in plan.sources],
    )


def custom_call(target: str, x: Tensor, *, text: str) -> Tensor:
    """A call of `target` with a tensor and some text, which gives a tensor like it."""
    made: list[Tensor] = binding._xla_custom_call(
        [x], target, [x.shape], [x.dtype], False, text, 1, {}
    )
    return made[0]


@contextlib.contextmanager
def _nothing_runs() -> Iterator[None]:
    """Makes an operation without a lowering an error; it would run on the host, on no data."""
    before = binding._get_allow_execution()
    binding._set_allow_execution(False)
    try:
        yield
    finally:
        binding._set_allow_execution(before)


def _use_seed(_: int) -> None:
    binding._xla_set_rng_seed(_SEED_MARK)


class NumberedNodes(ScopedNodes):
    """Runs a graph so that each operation of its HLO bears the number of its node.

    Args:
        graph: The graph.

    Attributes:
        nodes: The nodes by number, those of loops' bodies among them.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.nodes = list(all_nodes(graph.graph))
        numbers = {node: number for number, node in enumerate(self.nodes)}
        super().__init__(graph, scope_of=lambda node: f"node{numbers[node]}")

    def run_node(self, n: fx.Node) -> Any:
        """See `fx.Interpreter`."""
        if isinstance(n.target, torch._ops.OpOverload) and not _has_lowering(n.target):
            raise LoweringError(n, "there is no lowering")
        try:
            return super().run_node(n)
        except RuntimeError as error:
            raise LoweringError(n, str(error).splitlines()[0]) from error


_KERNELS = (
    "XLA",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)


@functools.cache
def _has_lowering(op: torch._ops.OpOverload[..., Any]) -> bool:
    """Whether an operation is XLA's or made of others; else the host would run it."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    name = f"{op._schema.name}.{op._overloadname}".removesuffix(".default")
    return any(has_kernel(name, key) for key in _KERNELS)
