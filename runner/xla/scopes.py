"""Names on the operations of a program, which profiles and the compiler's output show.

Source: `scope_pusher` and the debug metadata of torch_xla's lowering (torch_xla 2.9.0).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from runner.xla.binding import binding
from runner.xla.scan import bodies_run_by


class ScopedNodes(fx.Interpreter):
    """Runs a graph so that each operation of its HLO bears the scope of its node.

    The operation's name becomes `<scope>.<number>/<lazy operation>`; in a loop's body the scope of
    the loop comes first.

    Args:
        graph: The graph.
        scope_of: The scope of a node.
    """

    def __init__(self, graph: fx.GraphModule, *, scope_of: Callable[[fx.Node], str]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._scope_of = scope_of

    def run(self, *args: Any, **options: Any) -> Any:
        """See `fx.Interpreter`."""
        with bodies_run_by(self._run_body):
            return super().run(*args, **options)

    def _run_body(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        inner = copy.copy(self)
        fx.Interpreter.__init__(inner, graph, garbage_collect_values=True)
        return inner.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        """See `fx.Interpreter`."""
        scope = binding.profiler.scope_pusher(self._scope_of(n))
        try:
            return super().run_node(n)
        finally:
            del scope


@contextlib.contextmanager
def named_operations() -> Iterator[None]:
    """Keep scopes in the HLO of what is traced meanwhile."""
    before = binding._get_ir_debug()
    binding._set_ir_debug(True)
    try:
        yield
    finally:
        binding._set_ir_debug(before)
