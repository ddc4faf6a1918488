"""A function run again and again as one loop on the device, and that loop in a traced graph.

Unrolling gives the same numbers and a program that grows with every round. The operation
`torch.ops.runner.scan` is the loop in a functional graph; its body is a graph of its own, which
the node knows by name.

Source: `Op.mkwhile` and `LoweringContext` (torch_xla 2.9.0); what such a loop is, in
`jax.lax.scan`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch_xla.core import xla_builder as untyped

from runner.xla.binding import binding
from runner.xla.program import value_id
from runner.xla.seeds import is_seed, read_by, still_seed

xla_builder: Any = untyped
Op: Any = xla_builder.Op

#: From the carried tensors, one slice of each input and the constants to the next carried
#: tensors and this round's outputs.
Body = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    tuple[Sequence[Tensor], Sequence[Tensor]],
]


def scan(
    body: Body,
    carry: Sequence[Tensor],
    *,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    reverse: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run `body` once for each slice of the inputs.

    Args:
        body: Traced once, on tensors without data. It may read no other tensors of the device.
        carry: The carried tensors before the first round.
        inputs: Tensors of shape [rounds, ...].
        constants: Tensors that every round reads whole.
        seeds: int64 of shape [rounds]: each round's seed for random operations.
        reverse: Whether the last slice comes first. Outputs lie as the inputs do.

    Returns:
        The carried tensors after the last round, and the outputs stacked: [rounds, ...].
    """
    given = [*carry, *inputs, *constants, *([] if seeds is None else [seeds])]
    rounds = (inputs[0] if inputs else seeds).shape[0]  # type: ignore[union-attr]
    computation, hoisted, outputs = _loop(
        body, carry, inputs, constants, rounds=rounds, reverse=reverse, seeded=seeds is not None
    )
    found = binding._xla_user_computation("runner::scan", [*given, *hoisted], computation)
    count = len(carry)
    return list(found[:count]), list(found[len(given) : len(given) + outputs])


def _loop(
    body: Body,
    carry: Sequence[Tensor],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    *,
    rounds: int,
    reverse: bool,
    seeded: bool,
) -> tuple[Any, list[Tensor], int]:
    """The loop over `carry`, `inputs`, `constants`, seeds and what the body brings itself.

    Returns:
        The computation, what the body brings, and how many outputs there are. The results are
        the loop's tensors in that order, the outputs before what the body brings.
    """
    traced = _Traced(body, carry, inputs, constants)
    builder = xla_builder.create_builder("scan")
    given = [*carry, *inputs, *constants]
    shapes = [xla_builder.tensor_shape(tensor) for tensor in given]
    if seeded:
        shapes.append(xla_builder.mkshape(xla_builder.Type.S64, (rounds,)))
    shapes += [xla_builder.tensor_shape(tensor) for tensor in traced.hoisted]
    params = [xla_builder.mkparam(builder, i, shape) for i, shape in enumerate(shapes)]
    fixed = len(given) + seeded
    outputs = [_zeros(builder, one, rounds) for one in traced.outputs]
    start = Op.scalar(builder, 0, dtype=xla_builder.Type.S32)

    def goes_on(index: Any, *_: Any) -> Any:
        return index < Op.scalar(index.builder(), rounds, dtype=xla_builder.Type.S32)

    def one_round(index: Any, *state: Any) -> tuple[Any, ...]:
        parts = _split(state, len(carry), len(inputs), len(constants), int(seeded), len(outputs))
        carried, sliced, whole, seeds, made, hoisted = parts
        last = Op.scalar(index.builder(), rounds - 1, dtype=xla_builder.Type.S32)
        place = last - index if reverse else index
        seed = [_slice(one, place) for one in seeds]
        now = [*carried, *(_slice(one, place) for one in sliced), *whole]
        results = traced.call([*now, *hoisted], seed)
        carried, new = results[: len(carry)], results[len(carry) :]
        made = [_put(old, one, place) for old, one in zip(made, new, strict=True)]
        after = index + Op.scalar(index.builder(), 1, dtype=xla_builder.Type.S32)
        return (after, *carried, *sliced, *whole, *seeds, *made, *hoisted)

    state = [start, *params[:fixed], *outputs, *params[fixed:]]
    loop = Op.mkwhile(state, goes_on, one_round)
    results = [loop.get_tuple_element(1 + i) for i in range(len(state) - 1)]
    return Op.tuple(results).build("scan"), traced.hoisted, len(outputs)


class _Traced:
    """A body as a computation of its own.

    Attributes:
        outputs: Tensors of the shapes and types of one round's outputs.
        hoisted: Device tensors that the body reads without being given them.
    """

    def __init__(
        self,
        body: Body,
        carry: Sequence[Tensor],
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> None:
        places = [
            placeholder(tensor.shape[1:] if sliced else tensor.shape, tensor.dtype)
            for group, sliced in ((carry, False), (inputs, True), (constants, False))
            for tensor in group
        ]
        parts = _split(places, len(carry), len(inputs))
        after, self.outputs = body(*parts)
        for before, one in zip(carry, after, strict=True):
            if (before.shape, before.dtype) != (one.shape, one.dtype):
                raise ValueError(
                    f"a scanned function must return what it carries as it was: "
                    f"{before.dtype}{list(before.shape)}; got {one.dtype}{list(one.shape)}"
                )
        own = {value_id(place): i for i, place in enumerate(places)}
        results = [*after, *self.outputs]
        self._given = [own.get(value_id(one)) for one in results]
        made = [one for one, i in zip(results, self._given, strict=True) if i is None]
        context = binding.lowering.LoweringContext("body")
        context.build(made)
        self._computation = xla_builder.computation_from_module_proto("body", context.hlo())
        numbers = [context.tensor_parameter_id(place) for place in places]
        self._seed = _seed_number(context, made)
        known = {*numbers, self._seed}
        found: dict[int, Tensor] = context.device_parameter_id_tensor_mapping()
        still_seed(one for number, one in found.items() if number == self._seed)
        brought = {number: one for number, one in found.items() if number not in known}
        self.hoisted = [one.to(places[0].device) for one in brought.values()]
        self._numbers = [*numbers, *brought]

    def call(self, operands: Sequence[Any], seed: Sequence[Any]) -> list[Any]:
        """The body's results: of what it is given and what it brings, and a seed, if any."""
        arguments = dict(zip(self._numbers, operands, strict=True))
        if self._seed is not None:
            if not seed:
                raise ValueError("a scanned function draws random numbers, and brings no seeds")
            arguments[self._seed] = seed[0]
        arguments.pop(-1, None)
        made = Op.call(
            self._computation, [arguments[i] for i in sorted(arguments)], operands[0].builder()
        )
        count = itertools.count()
        return [
            made.get_tuple_element(next(count)) if i is None else operands[i] for i in self._given
        ]


def _seed_number(context: Any, results: Sequence[Tensor]) -> int | None:
    """The number of the parameter that random operations begin with, if there are any."""
    ids, values = read_by(list(results))
    for tensor_id, value in zip(ids, values, strict=True):
        if is_seed(tensor_id):
            return int(context.tensor_parameter_id(value))
    return None


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An XLA tensor without data."""
    place: Tensor = xla_builder.create_placeholder_tensor(tuple(shape), dtype)
    return place


def _split(values: Sequence[Any], *lengths: int) -> list[list[Any]]:
    """Parts of these lengths, and the rest."""
    ends = [0, *itertools.accumulate(lengths), len(values)]
    return [list(values[start:end]) for start, end in itertools.pairwise(ends)]


def _zeros(builder: Any, one: Tensor, rounds: int) -> Any:
    dtype = xla_builder.tensor_shape(one).dtype
    return Op.zero(builder, dtype=dtype).broadcast((rounds, *one.shape))


def _corner(stack: Any, index: Any) -> list[Any]:
    zero = Op.scalar(index.builder(), 0, dtype=xla_builder.Type.S32)
    return [index, *(zero for _ in stack.shape().sizes[1:])]


def _slice(stack: Any, index: Any) -> Any:
    sizes = stack.shape().sizes
    return stack.dynamic_slice(_corner(stack, index), (1, *sizes[1:])).reshape(sizes[1:])


def _put(stack: Any, one: Any, index: Any) -> Any:
    sizes = stack.shape().sizes
    return stack.dynamic_update_slice(one.reshape((1, *sizes[1:])), _corner(stack, index))


@dataclasses.dataclass(frozen=True)
class ScanBody:
    """A traced body: see `scan_body`.

    Attributes:
        name: A digest of what it computes.
        graph: From carried tensors, slices and constants, flat, to carried tensors and outputs.
        carried: How many tensors are carried.
    """

    name: str
    graph: fx.GraphModule
    carried: int

    def outputs(self) -> list[Tensor]:
        """Descriptions of one round's outputs."""
        (results,) = next(n for n in self.graph.graph.nodes if n.op == "output").args
        return [node.meta["val"] for node in results[self.carried :]]


_bodies: weakref.WeakValueDictionary[str, ScanBody] = weakref.WeakValueDictionary()


def scan_body(graph: fx.GraphModule, *, carried: int) -> ScanBody:
    """A body for `scanned`, which is known by its name as long as somebody keeps it."""
    body = ScanBody(_digest(graph), graph, carried)
    return _bodies.setdefault(body.name, body)


RunGraph = Callable[[fx.GraphModule, Sequence[Tensor]], Sequence[Tensor]]
_run_graph: RunGraph | None = None


@contextlib.contextmanager
def bodies_run_by(run: RunGraph) -> Iterator[None]:
    """Within it, the graph of a body is run by `run`, where others are lowered."""
    global _run_graph
    before, _run_graph = _run_graph, run
    try:
        yield
    finally:
        _run_graph = before


def body_of(node: fx.Node) -> fx.GraphModule | None:
    """The graph of a loop's body; None for a node that is no loop."""
    if node.target is not torch.ops.runner.scan.default:
        return None
    name = node.args[0]
    assert isinstance(name, str)
    return _bodies[name].graph


def all_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a graph and of the bodies of its loops."""
    for node in graph.nodes:
        yield node
        body = body_of(node)
        if body is not None:
            yield from all_nodes(body.graph)


def operations(graph: fx.Graph) -> int:
    """How many operations a graph has, those of loops' bodies once."""
    return sum(node.op == "call_function" for node in all_nodes(graph))


def _digest(graph: fx.GraphModule) -> str:
    graph.recompile()
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    held = [(name, value.tolist()) for name, value in graph.named_buffers()]
    told = (graph.code, [(tuple(value.shape), value.dtype) for value in values], held)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


_library: Any = torch.library.Library("runner", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "scan(str body, Tensor[] carry, Tensor[] inputs, Tensor[] constants, Tensor? seeds,"
    " bool reverse) -> Tensor[]"
)


def scanned(
    body: ScanBody,
    carry: Sequence[Tensor],
    *,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    reverse: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """As `scan`, for a graph that is traced, with a traced body."""
    made: list[Tensor] = torch.ops.runner.scan(
        body.name, list(carry), list(inputs), list(constants), seeds, reverse
    )
    return made[: len(carry)], made[len(carry) :]


def _on_xla(
    body: str,
    carry: list[Tensor],
    inputs: list[Tensor],
    constants: list[Tensor],
    seeds: Tensor | None,
    reverse: bool,
) -> list[Tensor]:
    graph, run = _bodies[body].graph, _run_graph

    def one_round(*groups: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        flat = [tensor for group in groups for tensor in group]
        results = graph(*flat) if run is None else run(graph, flat)
        return results[: len(carry)], results[len(carry) :]

    with _views_as_operations():
        after, outputs = scan(
            one_round, carry, inputs=inputs, constants=constants, seeds=seeds, reverse=reverse
        )
    return [torch._from_functional_tensor(tensor) for tensor in (*after, *outputs)]


@contextlib.contextmanager
def _views_as_operations() -> Iterator[None]:
    """Within an operation, as outside of it: views are functional, not gathers by their strides."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    included = torch._C._dispatch_tls_local_include_set()
    excluded = excluded.remove(torch._C.DispatchKey.Functionalize)
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


def _described(
    body: str,
    carry: list[Tensor],
    inputs: list[Tensor],
    constants: list[Tensor],
    seeds: Tensor | None,
    reverse: bool,
) -> list[Tensor]:
    rounds = inputs[0].shape[0]
    made = [
        torch.empty((rounds, *one.shape), dtype=one.dtype, device="meta")
        for one in _bodies[body].outputs()
    ]
    return [*(torch.empty_like(tensor) for tensor in carry), *made]


_library.impl("scan", _on_xla, "XLA")
_library.impl("scan", _described, "Meta")
