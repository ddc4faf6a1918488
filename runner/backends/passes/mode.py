"""While it is active, calls of torch's functions go through the rewrites.

Functions of `torch.nn.functional` that are written in Python are looked into, so that a rewrite
need only know what they call, and gradients are taken inside the mode, since a checkpointed part
runs its forward pass again there. Other modes that record what the user calls go above this one.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from runner.backends.passes.rewrite import Function, Rewrite

_ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


class Rewriting(TorchFunctionMode):
    """Applies rewrites to what is called while it is active.

    Args:
        rewrites: Of two that look at one function the later one is the outer one.
    """

    def __init__(self, rewrites: Sequence[Rewrite]) -> None:
        super().__init__()
        self._of: defaultdict[Function, list[Rewrite]] = defaultdict(list)
        for rewrite in rewrites:
            for call in rewrite.calls:
                self._of[call].append(rewrite)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        run = opened(func) if _is_opened(func) else func
        inside = run is not func
        for rewrite in self._of.get(func, ()):
            run = functools.partial(rewrite, run)
        with self if inside else contextlib.nullcontext():
            return run(*args, **(kwargs or {}))


def _is_opened(func: Any) -> bool:
    return isinstance(func, types.FunctionType) and (
        func.__globals__ is vars(torch.nn.functional) or func is torch.autograd.grad
    )


@functools.cache
def opened(func: types.FunctionType) -> Function:
    """A function of torch's that does not hand itself to the active modes, but its calls."""
    names = {**func.__globals__, **dict.fromkeys(_ASKS, lambda *_: False)}
    made = types.FunctionType(
        func.__code__, names, func.__name__, func.__defaults__, func.__closure__
    )
    made.__kwdefaults__ = func.__kwdefaults__
    return made
