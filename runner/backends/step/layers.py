"""A layer of a stack as a function of tensors, which can be computed a second time.

What it draws at random the first time is kept and given to it again; it runs in the precision of
then. How a stack of layers is run is decided in `remat.py` and `scan.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.stack import RunLayers, layers_run_by
from runner.backends.dropout import kept_share
from runner.backends.passes.rewrite import Held
from runner.backends.step.random import draws
from runner.record.errors import ConfigError

Call = Callable[..., Any]


class InTurn:
    """Runs layers one by one as they are.

    Args:
        lie: See `Activations.lie`.
    """

    def __init__(self, lie: Callable[[Tensor], Tensor]) -> None:
        self._lie = lie

    def __call__(
        self, call: Call, layers: Sequence[nn.Module], x: Tensor, *shared: Tensor
    ) -> Tensor:
        """The last layer's output: see `jobs.stack.run_layers`."""
        for layer in layers:
            x = call(layer, self._lie(x), *shared)
        return x


@contextlib.contextmanager
def run_by(run: RunLayers, *, needed: bool) -> Iterator[None]:
    """Within it, layers that repeat are run by `run`.

    Raises:
        ConfigError: They were `needed`, and there were none.
    """
    stacks = 0

    def counted(call: Call, layers: Sequence[nn.Module], x: Tensor, *shared: Tensor) -> Tensor:
        nonlocal stacks
        stacks += 1
        return run(call, layers, x, *shared)

    with layers_run_by(counted):
        yield
    if needed and not stacks:
        raise ConfigError(
            "remat must be none with a job whose model has no layers that repeat (it calls none "
            "by jobs.stack.run_layers): nothing would be computed again; got 'layers'"
        )


def named_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's parameters and buffers."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


class LayerFunction:
    """A layer as a function of its inputs, then its parameters and buffers.

    Args:
        call: From the layer and its inputs to its output.
        layer: The layer.
        parameters: To be told what stands for the layer's.

    Attributes:
        names: Of its parameters and buffers.
        drawn: What was drawn for it, in order.
    """

    def __init__(self, call: Call, layer: nn.Module, parameters: Held) -> None:
        self._layer, self._parameters = _Called(call, layer), parameters
        self.names = list(named_tensors(layer))
        self.drawn: list[Any] = []
        self._precision: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    @property
    def kind(self) -> str:
        """The name of the layer's class."""
        return type(self._layer.layer).__name__

    def first(self, tensors: Sequence[Tensor]) -> Tensor:
        """The output; what is drawn at random for it is kept.

        Raises:
            ConfigError: The layer changes a buffer, which would happen twice.
        """
        kind = tensors[0].device.type
        on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._precision = torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False)
        versions = [tensor._version for tensor in tensors]
        inputs = len(tensors) - len(self.names)
        # The second time no pass will know the batch, so it must not the first time.
        unknown = [tensor.detach() for tensor in tensors[:inputs]]
        with _Kept(self.drawn):
            output = self._run([*unknown, *tensors[inputs:]])
        if versions != [tensor._version for tensor in tensors]:
            raise ConfigError(
                f"remat must be none with layers that change their buffers: {self.kind} does, and "
                "computed again it would do so twice; got 'layers'"
            )
        return output

    def again(self, tensors: Sequence[Tensor], *, drawn: Sequence[Any] | None = None) -> Tensor:
        """The same output, with gradients, from what was drawn and in the precision of then."""
        self._parameters.also(tensors[len(tensors) - len(self.names) :])
        given = self.drawn if drawn is None else drawn
        with _Replayed(given), torch.set_grad_enabled(True), self._precision:
            return self._run(tensors)

    def gradients(
        self, output: Tensor, leaves: Sequence[Tensor], gradient: Tensor
    ) -> list[Tensor | None]:
        """Of each of `leaves`, None where none is wanted or there is none."""
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]

    def _run(self, tensors: Sequence[Tensor]) -> Tensor:
        inputs = len(tensors) - len(self.names)
        names = [f"layer.{name}" for name in self.names]
        lent = dict(zip(names, tensors[inputs:], strict=True))
        output: Tensor = functional_call(self._layer, lent, tuple(tensors[:inputs]))
        return output


class _Called(nn.Module):
    """A layer behind the call that it wants, so that both can be lent parameters."""

    def __init__(self, call: Call, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self._call = layer, call

    def forward(self, *inputs: Tensor) -> Any:
        return self._call(self.layer, *inputs)


class _Kept(TorchDispatchMode):
    """Keeps the results of random operations, in order; of dropout what was kept, no more."""

    def __init__(self, drawn: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._drawn = drawn

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if draws(func):
            self._drawn.append(result[1] if func is _DROPOUT else result)
        return result


class _Replayed(TorchDispatchMode):
    """Gives the results of random operations that were kept, in order."""

    def __init__(self, drawn: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._drawn = iter(drawn)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if not draws(func):
            return func(*args, **(kwargs or {}))
        result = next(self._drawn)
        return (kept_share(args[0], result, args[1]), result) if func is _DROPOUT else result


_DROPOUT = torch.ops.aten.native_dropout.default
