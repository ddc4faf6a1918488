"""Trace a training step to one functional FX graph.

Owns: fake inputs, functionalization, clean-up and the proof that no in-place op is left.
Refuses to know: what the step computes, and how the graph becomes a program.
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode

from runner.backends.dropout import DROPOUT
from runner.backends.step.batch_norm import unbias_running_variance
from runner.backends.step.cpu_norms import WHOLE_NORMS, Decompositions
from runner.backends.step.origins import NOT_THE_USERS
from runner.record.errors import BackendError

Outputs = Sequence["torch.Tensor | None"]
StepFn = Callable[..., Outputs]

_DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)

_SIGNS = (
    ("data-dependent", "it depends on a tensor's values"),
    ("device type tensor to numpy", "it reads a tensor's memory on the host (numpy)"),
    ("Cannot access data pointer", "it reads a tensor's memory on the host (numpy, data_ptr)"),
    (
        "Mixing fake modes",
        "a layer in a loop reads a tensor that was not handed to it: hand it to "
        "jobs.stack.run_layers, or have scan_layers=false",
    ),
    (
        "Please convert all Tensors to FakeTensors",
        "it uses a tensor that is neither parameter, buffer nor batch: register it as a buffer",
    ),
)


class UntraceableStepError(BackendError):
    """The step cannot become one graph; says which line of the user's code is the reason."""

    def __init__(self, reason: str, *, location: str | None) -> None:
        """Builds the message.

        Args:
            reason: What the tracer could not do.
            location: `file:line: source` of the innermost frame outside torch, if there is one.
        """
        where = location or "a place inside torch"
        super().__init__(
            f"backend=openxla_step: the training step cannot be traced to one graph at {where}: "
            f"{reason}; use backend=openxla (graph breaks allowed) or backend=lazy"
        )


@contextlib.contextmanager
def in_haste() -> Iterator[None]:
    """Traces without what costs more than it gives.

    The garbage collector would walk all of torch again and again; and of the graphs that become
    parts of another one nobody needs the code.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        if was_on:
            gc.enable()


@in_haste()
def trace_step(
    fn: StepFn, example_inputs: Sequence[torch.Tensor], *, decomposed: Decompositions = WHOLE_NORMS
) -> torch.fx.GraphModule:
    """Traces a step once to a functional graph over flat tensors.

    Args:
        fn: Takes the inputs as positional tensors; returns a flat sequence of tensors and Nones.
            It may work in place on its inputs and use autograd and `torch.optim`.
        example_inputs: Tensors whose shapes, dtypes and devices the graph is made for. Their
            values are not read.
        decomposed: What is written out in other operations, besides what torch_xla lacks.

    Returns:
        A graph module with one placeholder per input, no in-place op and no dead code.

    Raises:
        UntraceableStepError: The step depends on values of tensors, or leaves the graph.
    """
    graph_module = trace_unwritten(fn, example_inputs, decomposed=decomposed)
    graph_module.recompile()
    return graph_module


def trace_unwritten(
    fn: StepFn, example_inputs: Sequence[torch.Tensor], *, decomposed: Decompositions = WHOLE_NORMS
) -> torch.fx.GraphModule:
    """Traces as `trace_step` does, to a part of a larger graph: its code is not generated."""
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        mode = FakeTensorMode(allow_non_fake_inputs=False, static_shapes=True)
    fakes = [_fake_like(mode, tensor) for tensor in example_inputs]
    with _typed_errors(), mode, enable_python_dispatcher():
        functional = _functional(fn, len(fakes))
        table = {**_DECOMPOSED, **decomposed}
        graph_module = make_fx(functional, decomposition_table=table)(*fakes)
    _refuse_departures(graph_module.graph)
    graph_module.graph.eliminate_dead_code()
    assert_functional(graph_module.graph)
    unbias_running_variance(graph_module.graph)
    return graph_module


def _scaled_addmm(
    bias: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    """torch_xla has `addmm` without factors only."""
    if beta == alpha == 1:
        return NotImplemented
    return bias * beta + torch.mm(left, right) * alpha


def _pure_copy(
    into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
) -> torch.Tensor:
    """torch_xla's `copy` writes into its first argument, functional as its schema is."""
    return source.to(into.dtype).expand(into.shape)


_DECOMPOSED: dict[torch._ops.OpOverload[..., Any], Callable[..., Any]] = {
    torch.ops.aten.addmm.default: _scaled_addmm,
    torch.ops.aten.copy.default: _pure_copy,
    **DROPOUT,
}


def fake_inputs(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the same shapes, strides and types on `device`, without data."""
    with FakeTensorMode():
        return [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in tensors
        ]


def in_place_nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Returns the nodes whose op changes one of its arguments."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
    ]


def assert_functional(graph: torch.fx.Graph) -> None:
    """Stops a graph that the bridge would take without complaint and compute wrongly."""
    left = sorted({str(node.target) for node in in_place_nodes(graph)})
    assert not left, f"in-place ops left after functionalization: {left}"


def _fake_like(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    with mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def _functional(fn: StepFn, arity: int) -> Callable[..., list[torch.Tensor | None]]:
    """Wraps a step so that its in-place ops reach the tracer as functional ones.

    The functionalization sits below autograd, so the step may call `autograd.grad` inside it;
    functorch's transform (`torch.func.functionalize`) refuses `requires_grad_` there.
    """

    def functional_step(*inputs: torch.Tensor) -> list[torch.Tensor | None]:
        assert len(inputs) == arity
        torch._enable_functionalization(reapply_views=True)
        try:
            wrapped = [torch._to_functional_tensor(tensor) for tensor in inputs]
            with _PastFunctionModes():  # type: ignore[no-untyped-call]
                outputs = fn(*wrapped)
            return [_unwrap(output) for output in outputs]
        finally:
            torch._disable_functionalization()  # type: ignore[no-untyped-call]

    return functional_step


def _unwrap(output: torch.Tensor | None) -> torch.Tensor | None:
    if output is None or not torch._is_functional_tensor(output):
        return output
    torch._functionalize_sync(output)
    return torch._from_functional_tensor(output.detach())


class _PastFunctionModes(TorchDispatchMode):
    """Keeps from the modes for torch's functions what the tracer itself asks of tensors.

    Gradients are taken inside such modes, and the tracer asks some dozens of things an operation,
    each time by way of all of them; autograd asks five times for a device.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # type: ignore[no-untyped-call]
            if func is torch.ops.prim.device.default:
                return args[0].device
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except _DATA_DEPENDENT as error:
        raise UntraceableStepError(_reason(error), location=user_location(error)) from error
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = next((why for sign, why in _SIGNS if sign in str(error)), None)
        if reason is None:
            raise
        raise UntraceableStepError(reason, location=user_location(error)) from error


def _refuse_departures(graph: torch.fx.Graph) -> None:
    """Refuses a graph that brings a device tensor to the host."""
    devices = {node.meta["val"].device.type for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.device.type in devices:
            continue
        sources = [source.meta.get("val") for source in node.all_input_nodes]
        if any(isinstance(s, torch.Tensor) and s.device.type in devices for s in sources):
            raise UntraceableStepError(
                f"it moves a tensor to {value.device.type} ({node.target})", location=None
            )


def _reason(error: BaseException) -> str:
    if isinstance(error, DataDependentOutputException):
        return f"it reads a tensor's value on the host ({error.func})"
    if isinstance(error, DynamicOutputShapeException):
        return f"a shape depends on a tensor's values ({error.func})"
    return str(error).splitlines()[0]


def user_location(error: BaseException) -> str | None:
    """Returns `file:line: source` of the innermost frame of an error that is not in torch."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(NOT_THE_USERS):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None
