"""All passes by name, those that a configuration leaves on, and what they did."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx

from runner.backends.passes.attention import Attention
from runner.backends.passes.casts import shorten_casts
from runner.backends.passes.cross_entropy import CrossEntropy
from runner.backends.passes.embeddings import Embeddings
from runner.backends.passes.flash_attention import FlashAttention
from runner.backends.passes.indices import Indices
from runner.backends.passes.inputs import Inputs
from runner.backends.passes.mode import Rewriting
from runner.backends.passes.multihead import MultiheadAttention
from runner.backends.passes.norms import Norms
from runner.backends.passes.operands import keep_operands
from runner.backends.passes.parameters import ParametersAsActivations
from runner.backends.passes.parts import stack_parts
from runner.backends.passes.rewrite import Held, Rewrite
from runner.backends.passes.roundings import round_once
from runner.backends.passes.sums import widen_sums
from runner.config.schema import PassesConfig
from runner.record.errors import DeviceError

#: Passes at trace time, by the name of their switch.
REWRITES: Mapping[str, type[Rewrite]] = {
    "attention": Attention,
    "cross_entropy": CrossEntropy,
    "embeddings": Embeddings,
    "flash_attention": FlashAttention,
    "indices": Indices,
    "inputs": Inputs,
    "multihead": MultiheadAttention,
    "norms": Norms,
    "parameters": ParametersAsActivations,
}

#: Passes over the functional graph, in their order: each returns how much it changed.
GRAPH_PASSES: Mapping[str, Callable[[fx.Graph], int]] = {
    "parts": stack_parts,
    "sums": widen_sums,
    "roundings": round_once,
    "casts": shorten_casts,
    "operands": keep_operands,
}


def for_cpu(switches: PassesConfig) -> PassesConfig:
    """The switches of a program that runs on the CPU: without `inputs`, which says why.

    Raises:
        DeviceError: One was asked for that the CPU cannot run.
    """
    if switches.flash_attention:
        raise DeviceError(
            "backend.passes.flash_attention must be false on the CPU, which hardware=auto "
            "found: its kernels run on TPUs only; got true"
        )
    return dataclasses.replace(switches, inputs=False)


class Passes:
    """The passes of one step.

    Args:
        switches: Which of them are on.

    Attributes:
        parameters: To be told the model's parameters whenever something is traced.
        batch: Likewise the batch.
    """

    def __init__(self, switches: PassesConfig) -> None:
        self._on = {name for name, on in dataclasses.asdict(switches).items() if on}
        self.parameters, self.batch = Held(), Held()
        self._rewrites: dict[str, Rewrite] = {}
        self._made: dict[str, int] = {}

    @contextlib.contextmanager
    def rewriting(self) -> Iterator[None]:
        """Rewrites what is traced inside; within itself it does nothing more."""
        if self._rewrites:
            yield
            return
        self._made = {}
        self._rewrites = {
            name: make(self.parameters, self.batch)
            for name, make in REWRITES.items()
            if name in self._on
        }
        try:
            with Rewriting(list(self._rewrites.values())):
                yield
            for rewrite in self._rewrites.values():
                rewrite.check()
        finally:
            self._made |= {name: rewrite.count for name, rewrite in self._rewrites.items()}
            self._rewrites = {}

    def improve(self, graph: fx.GraphModule) -> None:
        """Runs the graph passes over a functional graph, out of sight of modes for functions."""
        with torch._C.DisableTorchFunction():  # type: ignore[no-untyped-call]
            for name, improve in GRAPH_PASSES.items():
                if name in self._on:
                    self._made[name] = self._made.get(name, 0) + improve(graph.graph)
        graph.recompile()

    @property
    def made(self) -> dict[str, int]:
        """What was changed since the last start of `rewriting`: pass to how often, never 0."""
        rewritten = {name: rewrite.count for name, rewrite in self._rewrites.items()}
        return {name: count for name, count in {**self._made, **rewritten}.items() if count}
