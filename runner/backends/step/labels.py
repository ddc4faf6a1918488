"""The names of a model's modules on the operations of the compiled step, or none."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from runner.backends.base import Recipe
from runner.backends.step.origins import Origins, origin_of
from runner.xla.scopes import ScopedNodes, named_operations

Graph = Callable[..., Any]


class Unlabelled:
    """Leaves everything as it is."""

    def on(self, recipe: Recipe) -> Recipe:
        """A recipe whose phases are known while it is traced."""
        return recipe

    def traced(self) -> contextlib.AbstractContextManager[None]:
        """Around the tracing."""
        return contextlib.nullcontext()

    def lowered(self, graph: fx.GraphModule) -> contextlib.AbstractContextManager[Graph]:
        """Around the making of a program of a traced graph; gives what runs the graph."""
        return contextlib.nullcontext(graph)


class Labels(Unlabelled):
    """Follows a step's tracing and names the operations that come of it `phase/module`.

    Args:
        model: The module whose parts are named.
        scanned: Whether its layers that repeat are: see `Origins`.
    """

    def __init__(self, model: nn.Module, *, scanned: bool) -> None:
        self._origins = Origins(model, scanned=scanned)

    def on(self, recipe: Recipe) -> Recipe:
        """See `Unlabelled`."""
        return dataclasses.replace(
            recipe,
            loss=self._origins.loss(recipe.loss),
            make_optimizer=self._origins.optimizer(recipe.make_optimizer),
        )

    def traced(self) -> contextlib.AbstractContextManager[None]:
        """See `Unlabelled`."""
        return self._origins.recorded()

    @contextlib.contextmanager
    def lowered(self, graph: fx.GraphModule) -> Iterator[Graph]:
        """See `Unlabelled`."""
        with named_operations():
            yield ScopedNodes(graph, scope_of=_label).run


def _label(node: fx.Node) -> str:
    origin = origin_of(node)
    return f"{origin.phase}/{origin.module}" if origin.module else origin.phase
