"""Tell every traced operation which module and which line of the model it came from.

Works from outside the tracer: module hooks, a torch function mode and autograd's sequence
numbers write an `Origin` into FX's node metadata while somebody else traces.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import traceback as fx_traceback
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from runner.backends.passes.mode import opened
from runner.backends.step.stacks import find_layers

_RUNNER = str(pathlib.Path(__file__).parents[2])
#: How names of files begin that hold no code of the user's.
NOT_THE_USERS = (str(pathlib.Path(torch.__file__).parent), _RUNNER, "<")
_KEY = "origin"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an operation came from.

    Attributes:
        phase: "forward", "backward", "recompute" (of a checkpointed part), "optimizer", or
            "step" for what the runner adds: clipping, averaging over micro-batches.
        module: Dotted path of the innermost module, or "".
        file: Source file of the user's line, or "" where none is known.
        line: Its number, from 1, or 0.
    """

    phase: str
    module: str = ""
    file: str = ""
    line: int = 0


UNKNOWN = Origin("step")


def origin_of(node: fx.Node) -> Origin:
    """Where a traced node came from."""
    origin = node.meta.get("custom", {}).get(_KEY, UNKNOWN)
    assert isinstance(origin, Origin)
    return origin


class Origins(TorchFunctionMode):
    """Records origins while it is active.

    Args:
        model: The module whose parts are named.
        scanned: Whether layers that repeat have one name, since one is traced for all.
    """

    def __init__(self, model: nn.Module, *, scanned: bool = False) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in model.named_modules()}
        for whole, layers in (find_layers(model) if scanned else {}).items():
            for part, module in model.get_submodule(layers[0]).named_modules():
                self._names[id(module)] = f"{whole}.{part}".removesuffix(".")
        self._modules: list[str] = []
        # Autograd numbers what it records in each thread anew; it runs backward passes in others.
        self._recorded = threading.local()
        self._phase = "step"

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record while something is traced."""
        hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with fx_traceback.preserve_node_meta(), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`loss`, its operations known as the forward pass."""

        def recorded_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            with self._in_phase("forward"):
                return loss(model, batch)

        return recorded_loss

    def optimizer(self, make: Callable[[nn.Module], Optimizer]) -> Callable[[nn.Module], Optimizer]:
        """`make`, the updates of what it makes known as the optimizer's."""

        def recorded_optimizer(module: nn.Module) -> Optimizer:
            optimizer = make(module)
            optimizer.register_step_pre_hook(lambda *_: self._set("optimizer"))
            optimizer.register_step_post_hook(lambda *_: self._set("step"))
            return optimizer

        return recorded_optimizer

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.autograd.grad:
            self._follow_backward([args[0]] if isinstance(args[0], Tensor) else args[0])
            # Layers that are computed again, and their gradients, come in here.
            with self._in_phase("backward"), self:
                return opened(func)(*args, **(kwargs or {}))
        if self._phase == "backward":  # marked by what autograd runs
            return func(*args, **(kwargs or {}))
        origin = self._here(sys._getframe(1))
        _mark(origin)
        before = _sequence_number()
        result = func(*args, **(kwargs or {}))
        if _sequence_number() > before:
            numbers, made = self._record()
            numbers.append(before)
            made.append(origin)
        return result

    def _record(self) -> tuple[list[int], list[Origin]]:
        """First numbers of what autograd recorded in this thread, and where that came from."""
        if not hasattr(self._recorded, "lists"):
            self._recorded.lists = [], []
        found: tuple[list[int], list[Origin]] = self._recorded.lists
        return found

    def _here(self, frame: FrameType | None) -> Origin:
        file, line = "", 0
        if self._phase in ("forward", "recompute"):
            while frame is not None and frame.f_code.co_filename.startswith(NOT_THE_USERS):
                frame = frame.f_back
            if frame is not None:
                file, line = frame.f_code.co_filename, frame.f_lineno
        return Origin(self._phase, self._modules[-1] if self._modules else "", file, line)

    def _enter(self, module: nn.Module, _: Any) -> None:
        if self._phase == "backward":
            self._phase = "recompute"
        self._modules.append(self._names.get(id(module), ""))
        _mark(self._here(sys._getframe(1)))

    def _leave(self, module: nn.Module, _: Any, __: Any) -> None:
        self._modules.pop()
        if self._phase == "recompute" and not self._modules:
            self._phase = "backward"
        _mark(self._here(sys._getframe(1)))

    def _follow_backward(self, outputs: Sequence[Tensor]) -> None:
        """Marks what autograd will run for each operation that it has recorded."""
        waiting, seen = [output.grad_fn for output in outputs], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [source for source, _ in node.next_functions]
            node.register_prehook(self._backward_of(node))

    def _backward_of(self, node: Any) -> Callable[[Any], None]:
        numbers, made = self._record()
        place = bisect.bisect_right(numbers, node._sequence_nr()) - 1
        origin = dataclasses.replace(made[place] if place >= 0 else UNKNOWN, phase="backward")
        return lambda _: _mark(origin)

    def _set(self, phase: str) -> None:
        self._phase = phase
        _mark(Origin(phase))

    @contextlib.contextmanager
    def _in_phase(self, phase: str) -> Iterator[None]:
        before = self._phase
        self._set(phase)
        try:
            yield
        finally:
            self._set(before)


def _mark(origin: Origin) -> None:
    fx_traceback.get_current_meta()["custom"] = {_KEY: origin}


def _sequence_number() -> int:
    """The number that autograd will give to the next operation that it records."""
    return int(torch._C._autograd._get_sequence_nr())
