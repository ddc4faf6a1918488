"""The openxla backend: AOTAutograd's forward and backward, each compiled by the dynamo bridge.

This is PyTorch's `torch/_dynamo/backends/torchxla.py` taken further: every graph leaves a
record, a recompile is explained, and nothing is left for the bridge to block on. Three
programs a step: forward, backward, and the optimizer as one lazy graph.

Source: `torch/_dynamo/backends/torchxla.py` (torch 2.9.0).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd
from torch.amp.autocast_mode import _enter_autocast

from runner.backends.base import Batch, Metrics, Recipe
from runner.backends.compiles import CompileLog, Watch
from runner.backends.dropout import DROPOUT
from runner.backends.lazy import XlaInPlaceBackend
from runner.xla import counters, device
from runner.xla.bridge import CompiledGraph, extract

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class FirstCallCompiler:
    """Compiles an FX graph at its first call, when there are real XLA tensors to lower with.

    Args:
        graph: The graph; it is dropped once it is compiled.
        role: The graph's role in its record.
        log: Where the record goes.
    """

    def __init__(self, graph: fx.GraphModule, *, role: str, log: CompileLog) -> None:
        self._graph: fx.GraphModule | None = graph
        self._compiled: CompiledGraph | None = None
        self._role = role
        self._log = log

    def __call__(self, *args: Tensor) -> Any:
        """Run the compiled graph."""
        if self._compiled is None:
            self._compiled = self._compile(args)
        return self._compiled(*args)

    def _compile(self, args: Sequence[Tensor]) -> CompiledGraph:
        graph, self._graph = self._graph, None
        assert graph is not None
        with self._log.watch(self._role, args, certain=True) as watch:
            describe_graph(graph, watch)
            return extract(graph, args)


def describe_graph(graph: fx.GraphModule, watch: Watch) -> None:
    """Put a graph's size and its hash, a function of its code and shapes, on record."""
    watch.nodes = sum(node.op == "call_function" for node in graph.graph.nodes)
    watch.hash = hashlib.sha256(graph.code.encode()).hexdigest()[:16]


def openxla_eval_for(log: CompileLog) -> Compiler:
    """A dynamo backend for inference: the bridge without AOTAutograd.

    A graph that enters or leaves autocast goes through AOTAutograd all the same, which leaves
    its casts and nothing else of it: the bridge orders nodes by who reads them, and these are
    read by none, so that a nested autocast stayed on in the process.
    """
    traced = openxla_for(log)

    def compiler(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if any(node.target is _enter_autocast for node in graph.graph.nodes):
            return traced(graph, example_inputs)
        return FirstCallCompiler(graph, role="eval", log=log)

    return compiler


def _boxed(log: CompileLog, role: str) -> Compiler:
    def compiler(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        boxed: Callable[..., Any] = make_boxed_func(FirstCallCompiler(graph, role=role, log=log))
        return boxed

    return compiler


def openxla_for(log: CompileLog) -> Compiler:
    """A dynamo backend for training: AOTAutograd around the boxed form of the bridge."""
    compiler: Compiler = aot_autograd(
        fw_compiler=_boxed(log, "forward"),
        bw_compiler=_boxed(log, "backward"),
        inference_compiler=_boxed(log, "eval"),
        decompositions=dict(DROPOUT),
    )
    return compiler


#: Graphs compiled through the names that are registered with dynamo.
REGISTERED_LOG = CompileLog(totals=counters.compiles)

register_backend(name="runner_openxla", compiler_fn=openxla_for(REGISTERED_LOG))
register_backend(name="runner_openxla_eval", compiler_fn=openxla_eval_for(REGISTERED_LOG))


class OpenXla(XlaInPlaceBackend):
    """Forward and backward through dynamo and AOTAutograd, the optimizer lazily."""

    def __init__(self, recipe: Recipe, *, log: CompileLog) -> None:
        super().__init__(recipe, log=log)
        torch._dynamo.reset()
        self._forward = torch.compile(self.forward, backend=openxla_for(log), dynamic=False)
        self._metrics = torch.compile(self.metrics, backend=openxla_eval_for(log), dynamic=False)

    def train_step(self, batch: Batch, *, step: int, lr: float) -> Metrics:
        """See `Backend.train_step`."""
        device.manual_seed(self.recipe.step_seed(step))
        self.model.train()
        metrics = self.update(self._forward, batch, lr=lr)
        with self.log.watch("optimizer", list(batch.values())):
            device.sync()
        for role in ("forward", "backward", "optimizer"):
            self.log.warmed(role)
        return metrics

    @torch.no_grad()
    def eval_step(self, batch: Batch, mask: Tensor) -> Metrics:
        """See `Backend.eval_step`."""
        self.model.eval()
        metrics = self._metrics(batch, mask)
        device.sync()
        self.log.warmed("eval")
        return dict(metrics)


class OpenXlaEval(OpenXla):
    """The bridge without AOTAutograd; for `mode=evaluate` only, it has no backward."""

    def train_step(self, batch: Batch, *, step: int, lr: float) -> Metrics:
        """Not to be had: see `runner.config.validate`, which refuses it first."""
        raise NotImplementedError("openxla_eval has no backward; use openxla to train")
