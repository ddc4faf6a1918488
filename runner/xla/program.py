"""One XLA program bound to a functional graph, with nothing left to decide per call.

Owns: building the program once, donation, and the fixed mapping between flat tensors and the
program's parameters and results. Refuses to know: what the tensors mean.
"""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

from runner.record.errors import BackendError
from runner.xla.autocast import switched_off
from runner.xla.binding import binding, torch_xla
from runner.xla.binding import xla_model as xm
from runner.xla.seeds import is_seed, read_by

Flat = Sequence[torch.Tensor]


class ProgramError(BackendError):
    """The graph cannot be bound to one program."""


@dataclass(frozen=True)
class ProgramFacts:
    """What building a program told.

    Attributes:
        graph_hash: torch_xla's key of the compiled program.
        ir_s: Seconds to turn the FX graph into XLA's representation.
        xla_s: Seconds in XLA's compiler, or in finding the program in its cache.
        compiles: 1, or 0 if this process had compiled the same graph before.
        aliases: Number of parameters whose buffers are given to the results.
        parameters: Number of the program's parameters.
        constants: Number of parameters that are neither an input nor a seed.
        results: Number of the program's results.
    """

    graph_hash: bytes
    ir_s: float
    xla_s: float
    compiles: int
    aliases: int
    parameters: int
    constants: int
    results: int


class Program:
    """A compiled functional graph.

    A call takes a flat list (the inputs in the graph's order, then `seeds` integers as 0-d int64
    tensors) and returns the graph's outputs in order, Nones included. Donated inputs are dead
    after the call.

    Attributes:
        facts: What building it told.
        draws: Whether it reads a seed.
    """

    def __init__(
        self,
        graph: Callable[..., Sequence[torch.Tensor | None]],
        inputs: Flat,
        *,
        donate: Sequence[int] = (),
        seeds: int = 0,
    ) -> None:
        """Builds and compiles.

        Args:
            graph: A functional graph. With `seeds` it is called with a `use_seed` keyword, and
                calls `use_seed(k)` where the random numbers of step k begin.
            inputs: XLA tensors. Their values do not matter; they are not consumed.
            donate: Indices of inputs whose buffers the program may reuse. Inputs that the graph
                returns unchanged or does not read are left alone.
            seeds: How many seeds a call brings.

        Raises:
            ProgramError: Two donated inputs share one buffer, or an op has no XLA lowering.
        """
        _refuse_shared_buffers(inputs, donate)
        with _clean_trace(inputs), _donated(inputs, donate):
            started = time.monotonic()
            outputs = _trace_outputs(graph, inputs, seeds)
            plan = OutputPlan(outputs, inputs)
            _release_unchanged(inputs, plan.unchanged)
            ids, values = read_by(plan.results)
            ir_s = time.monotonic() - started
            self.facts = _compile(plan.results, ids=ids, values=values, ir_s=ir_s)
        self._run = binding._run_cached_graph
        self._hash = self.facts.graph_hash
        sources = _Binding(inputs, ids=ids, values=values, seeds=seeds)
        self._constants = sources.constants
        self._take_arguments = _taker(sources.order)
        self.draws = any(len(inputs) <= i < len(inputs) + seeds for i in sources.order)
        self._take_unchanged = _taker(plan.unchanged)
        self._take_outputs = plan.taker()
        self.facts = replace(self.facts, constants=len(sources.constants))

    def __call__(self, flat: list[torch.Tensor]) -> list[Any]:
        """Runs the program; returns before it has ended.

        Args:
            flat: Inputs in the order of the graph, then the seeds.
        """
        results: list[Any] = self._run(
            self._hash,
            self._take_arguments(flat + self._constants if self._constants else flat),
        )
        if self._take_outputs is None:
            return results
        results.extend(self._take_unchanged(flat))
        results.append(None)
        return list(self._take_outputs(results))


class OutputPlan:
    """Which of a graph's outputs the program computes, and where the others come from."""

    def __init__(self, outputs: Sequence[torch.Tensor | None], inputs: Flat) -> None:
        own = {binding._unique_id_for_ir_and_data(tensor): i for i, tensor in enumerate(inputs)}
        seen: dict[str, int] = {}
        self.results: list[torch.Tensor] = []
        self.sources: list[tuple[str, int]] = []
        for output in outputs:
            if output is None:
                self.sources.append(("none", 0))
                continue
            key = value_id(output)
            if key in own:
                self.sources.append(("input", own[key]))
                continue
            if key not in seen:
                seen[key] = len(self.results)
                self.results.append(output)
            self.sources.append(("result", seen[key]))
        self.unchanged = sorted({index for kind, index in self.sources if kind == "input"})

    def taker(self) -> Callable[[Sequence[Any]], tuple[Any, ...]] | None:
        """Returns what picks the outputs from results + unchanged + [None]; None if 1 to 1."""
        computed = len(self.results)
        place = {index: computed + i for i, index in enumerate(self.unchanged)}
        nothing = computed + len(self.unchanged)
        order = [
            index if kind == "result" else place[index] if kind == "input" else nothing
            for kind, index in self.sources
        ]
        return None if order == list(range(computed)) else _taker(order)


class _Binding:
    """Where each parameter of the program comes from: inputs, seeds, constants."""

    def __init__(
        self, inputs: Flat, *, ids: Sequence[int], values: Sequence[torch.Tensor], seeds: int
    ) -> None:
        positions = {binding._xla_get_tensor_id(tensor): i for i, tensor in enumerate(inputs)}
        self.constants: list[torch.Tensor] = []
        self.order: list[int] = []
        for tensor_id, value in zip(ids, values, strict=True):
            if tensor_id in positions:
                self.order.append(positions[tensor_id])
            elif is_seed(tensor_id):
                self.order.append(len(inputs) + self._seed_number(value, seeds))
            else:
                self.order.append(len(inputs) + seeds + len(self.constants))
                self.constants.append(value)

    @staticmethod
    def _seed_number(value: torch.Tensor, seeds: int) -> int:
        number = int(value.item()) - _SEED_MARK
        if not 0 <= number < seeds:
            raise ProgramError(f"the graph draws random numbers and brings no seed; seeds={seeds}")
        return number


# Seeds of the trace: a seed parameter is told from another by its value while tracing.
_SEED_MARK = 7_340_033


def _taker(order: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(order) == 1:
        index = order[0]
        return lambda values: (values[index],)
    return operator.itemgetter(*order) if order else lambda values: ()


def _settle(inputs: Flat) -> None:
    """Gives every live tensor its data: a trace must not swallow others' pending work."""
    torch_xla.sync(reset_scope=False)
    xm.wait_device_ops()
    pending = [
        i for i, x in enumerate(binding._check_tensor_need_materialization(list(inputs))) if x
    ]
    assert not pending, f"inputs without data after a sync: {pending}"


def _refuse_shared_buffers(inputs: Flat, donate: Sequence[int]) -> None:
    donors = [binding._unique_id_for_ir_and_data(inputs[index]) for index in donate]
    if len(set(donors)) != len(donors):
        raise ProgramError("two donated inputs share one buffer (a clone on XLA shares it)")


def value_id(output: torch.Tensor) -> str:
    """The same for tensors that stand for one value."""
    return str(binding._unique_id_for_ir_and_data(output))


def _release_unchanged(inputs: Flat, unchanged: Sequence[int]) -> None:
    """What is returned as it came must outlive the call."""
    for index in unchanged:
        binding._set_buffer_donation(inputs[index], False)


@contextlib.contextmanager
def _donated(inputs: Flat, donate: Sequence[int]) -> Iterator[None]:
    """Marks donors while the program is built.

    The mark stays with the buffer: left on, a later `torch_xla.sync()` that reads the tensor
    would consume it.
    """
    for index in donate:
        if not binding._set_buffer_donation(inputs[index], True):
            raise ProgramError(f"input {index} has no buffer to donate")
    try:
        yield
    finally:
        for index in donate:
            binding._set_buffer_donation(inputs[index], False)


@contextlib.contextmanager
def _clean_trace(inputs: Flat) -> Iterator[None]:
    """Bakes Python numbers into the program, and afterwards forgets the traced work."""
    seed = binding._xla_get_rng_seed()
    _settle(inputs)
    try:
        lazily = torch_xla.experimental.eager_mode_context(False)
        with numbers_as_constants(), lazily, torch.no_grad(), switched_off():
            yield
    finally:
        binding._clear_pending_irs(str(torch_xla.device()))
        binding._xla_set_rng_seed(seed)


@contextlib.contextmanager
def numbers_as_constants() -> Iterator[None]:
    """Makes every Python number a constant of the graph instead of one more parameter."""
    before = (
        binding._get_xla_handle_special_scalars(),
        binding._get_xla_all_numbers_special_scalars(),
    )
    binding._set_xla_handle_special_scalars(True)
    binding._set_xla_all_numbers_special_scalars(True)
    try:
        yield
    finally:
        binding._set_xla_handle_special_scalars(before[0])
        binding._set_xla_all_numbers_special_scalars(before[1])


def upload(tensors: Flat) -> list[torch.Tensor]:
    """Copies host tensors to the device in one transfer, each into a buffer of its own.

    Plain `.to(device)` makes a 0-d tensor of 0 or 1 a pending constant, and serves others of
    equal value from a cache: sixty step counters would share one buffer, and donating one of
    them would kill the cache's.
    """
    host = [tensor.detach().cpu().contiguous() for tensor in tensors]
    names = [str(torch_xla.device())] * len(host)
    uploaded: list[torch.Tensor] = binding._xla_tensors_from_aten(host, names, None)
    return uploaded


def _trace_outputs(
    graph: Callable[..., Sequence[torch.Tensor | None]], inputs: Flat, seeds: int
) -> list[torch.Tensor | None]:
    before = _fallbacks()
    options: dict[str, Any] = {}
    if seeds:
        options["use_seed"] = lambda k: binding._xla_set_rng_seed(_SEED_MARK + k)
    outputs = list(graph(*inputs, **options))
    fell_back = sorted(k for k, n in _fallbacks().items() if n > before.get(k, 0))
    if fell_back:
        raise ProgramError(f"no XLA lowering for {', '.join(fell_back)}")
    return outputs


def _fallbacks() -> Mapping[str, int]:
    names = [name for name in binding._xla_counter_names() if name.startswith("aten::")]
    return {name: binding._xla_counter_value(name) for name in names}


def _compile(
    results: list[torch.Tensor], *, ids: Sequence[int], values: Sequence[Any], ir_s: float
) -> ProgramFacts:
    compiles, aliases = _samples("CompileTime"), _total("InputOutputAliasCount")
    started = time.monotonic()
    with alias_with_buffer_donor_config():
        graph_hash = binding._get_graph_hash(results)
        binding._xla_warm_up_cache(results, [])
    return ProgramFacts(
        graph_hash=graph_hash,
        ir_s=ir_s,
        xla_s=time.monotonic() - started,
        compiles=_samples("CompileTime") - compiles,
        aliases=int(_total("InputOutputAliasCount") - aliases),
        parameters=len(ids),
        constants=0,
        results=len(results),
    )


def _samples(name: str) -> int:
    data = binding._xla_metric_data(name)
    return int(data[0]) if data else 0


def _total(name: str) -> float:
    data = binding._xla_metric_data(name)
    return float(data[1]) if data else 0.0
