"""Layers whose inside is not kept for the backward pass but computed again there.

Of each layer its inputs, and what it drew at random, live on until its backward pass. That starts
behind a barrier which holds the gradient back together with all that the layer reads: XLA neither
finds the second forward pass equal to the first nor begins with it early, and parameters that are
gathered from other devices are gathered again. Source: Chen et al., "Training deep nets with
sublinear memory cost", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner.backends.passes.rewrite import Held
from runner.backends.step.layers import Call, LayerFunction, named_tensors
from runner.xla.barrier import barrier


class Remat:
    """Runs layers one by one so that each is computed again in the backward pass.

    Args:
        parameters: To be told what stands for the parameters the second time.
        lie: See `Activations.lie`.
    """

    def __init__(self, parameters: Held, *, lie: Callable[[Tensor], Tensor]) -> None:
        self._parameters, self._lie = parameters, lie

    def __call__(
        self, call: Call, layers: Sequence[nn.Module], x: Tensor, *shared: Tensor
    ) -> Tensor:
        """The last layer's output: see `jobs.stack.run_layers`.

        Raises:
            ConfigError: A layer changes a buffer, which would happen twice.
        """
        for layer in layers:
            function = LayerFunction(call, layer, self._parameters)
            own = named_tensors(layer).values()
            x = _Recomputed.apply(function, self._lie(x), *shared, *own)  # type: ignore[no-untyped-call]
        return x


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: LayerFunction, *tensors: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*tensors)
        return layer.first(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *behind, gradient = barrier([*ctx.saved_tensors, *gradients])
        asked = ctx.needs_input_grad[1:]
        leaves = [
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(behind, asked, strict=True)
        ]
        output = ctx.layer.again(leaves)
        return None, *ctx.layer.gradients(output, leaves, gradient)
