"""What tracing a step costs besides the step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from runner.backends.passes.mode import Rewriting
from runner.backends.step.trace import trace_step

DEPTH = 20


class Calls(Rewriting):
    """A mode that gradients are taken in, and what it was asked of torch."""

    def __init__(self) -> None:
        super().__init__([])
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[getattr(func, "__name__", str(func))] += 1
        return super().__torch_function__(func, types, args, kwargs)


def deep(x: Tensor) -> list[Tensor]:
    x = x.requires_grad_()
    y = x
    for _ in range(DEPTH):
        y = torch.sin(y)
    return list(torch.autograd.grad(y.sum(), [x]))


def test_modes_see_what_the_step_calls_and_not_what_the_tracer_asks() -> None:
    with Calls() as calls:
        graph = trace_step(deep, [torch.ones(3)])
    assert sum(node.target is torch.ops.aten.cos.default for node in graph.graph.nodes) == DEPTH
    assert calls.seen["sin"] == DEPTH
    assert sum(calls.seen.values()) < 5 * DEPTH, calls.seen
