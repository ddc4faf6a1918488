"""Layers whose inside is not kept for the backward pass but computed again there.

Of each layer its inputs, and what it drew at random, live on until its backward pass. That starts
behind a barrier which holds the gradient back together with all that the layer reads: XLA neither
finds the second forward pass equal to the first nor begins with it early, and parameters that are
gathered from other devices are gathered again. Source: Chen et al., "Training deep nets with
sublinear memory cost", 2016.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.stack import layers_called_by
from runner.backends.passes.rewrite import Parameters
from runner.record.errors import ConfigError
from runner.xla.barrier import barrier

Call = Callable[..., Any]


class Remat:
    """Calls layers so that they are computed again in the backward pass.

    Args:
        parameters: To be told what stands for the parameters the second time.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._called = 0

    @contextlib.contextmanager
    def layers(self) -> Iterator[None]:
        """Around a loss, whose layers are computed again in its backward pass.

        Raises:
            ConfigError: It has none.
        """
        self._called = 0
        with layers_called_by(self):
            yield
        if not self._called:
            raise ConfigError(
                "remat must be none with a job whose model has no layers that repeat (it calls "
                "none by jobs.stack.run_layers): nothing would be computed again; got 'layers'"
            )

    def __call__(self, call: Call, layer: nn.Module, x: Tensor, *shared: Tensor) -> Tensor:
        """The layer's output: see `jobs.stack.run_layers`.

        Raises:
            ConfigError: The layer changes a buffer, which would happen twice.
        """
        self._called += 1
        named = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        buffers = list(layer.buffers())
        versions = [buffer._version for buffer in buffers]
        names = [f"layer.{name}" for name in named]
        run = _Run(_Called(call, layer), names, self._parameters)
        output: Tensor = _Recomputed.apply(run, x, *shared, *named.values())  # type: ignore[no-untyped-call]
        if versions != [buffer._version for buffer in buffers]:
            raise ConfigError(
                f"remat must be none with layers that change their buffers: {type(layer).__name__} "
                "does, and computed again it would do so twice; got 'layers'"
            )
        return output


class _Called(nn.Module):
    """A layer behind the call that it wants, so that both can be lent parameters."""

    def __init__(self, call: Call, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self._call = layer, call

    def forward(self, *inputs: Tensor) -> Any:
        return self._call(self.layer, *inputs)


class _Run:
    """A layer as a function of its inputs, then its parameters and buffers."""

    def __init__(self, layer: _Called, names: Sequence[str], parameters: Parameters) -> None:
        self._layer, self._names, self._parameters = layer, names, parameters
        self._drawn: list[Any] = []
        self._precision: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def first(self, tensors: Sequence[Tensor]) -> Tensor:
        """The output; what is drawn at random for it is kept."""
        kind = tensors[0].device.type
        on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._precision = torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False)
        with _Kept(self._drawn):
            return self._run(tensors)

    def again(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same output, with gradients, from what was drawn and in the precision of then."""
        self._parameters.also(tensors[len(tensors) - len(self._names) :])
        with _Replayed(self._drawn), torch.set_grad_enabled(True), self._precision:
            return self._run(tensors)

    def _run(self, tensors: Sequence[Tensor]) -> Tensor:
        inputs = len(tensors) - len(self._names)
        lent = dict(zip(self._names, tensors[inputs:], strict=True))
        output: Tensor = functional_call(self._layer, lent, tuple(tensors[:inputs]))
        return output


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run.first(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *behind, gradient = barrier([*ctx.saved_tensors, *gradients])
        asked = ctx.needs_input_grad[1:]
        leaves = [
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(behind, asked, strict=True)
        ]
        output = ctx.run.again(leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
        return None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


class _Kept(TorchDispatchMode):
    """Keeps the results of random operations, in order."""

    def __init__(self, drawn: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._drawn = drawn

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _draws(func):
            self._drawn.append(result)
        return result


class _Replayed(TorchDispatchMode):
    """Gives the results of random operations that were kept, in order."""

    def __init__(self, drawn: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._drawn = iter(drawn)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return next(self._drawn) if _draws(func) else func(*args, **(kwargs or {}))


def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags
