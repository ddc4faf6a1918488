"""Parameters that meet activations under autocast are taken in the activations' type.

Autocast casts what goes into a matrix product and nothing else: a float32 position embedding, a
class token or a layer scale makes the bf16 activations that it is added to, joined with or
multiplied by float32, and all that follows. Here the parameter is rounded to the precision asked
for, as a weight is. It is broadcast before, so that its gradient is summed in float32. Not exact,
and off unless asked for: a transformer's residual stream begins here, and gradients err more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runner.backends.passes.rewrite import Function, Rewrite, autocast_type


class ParametersAsActivations(Rewrite):
    """Sums, differences, products and joins of a parameter with activations."""

    calls = (
        torch.add,
        torch.cat,
        torch.concat,
        torch.concatenate,
        torch.mul,
        torch.multiply,
        torch.sub,
        torch.subtract,
        torch.Tensor.__radd__,
        torch.Tensor.__rmul__,
        torch.Tensor.__rsub__,
        torch.Tensor.add,
        torch.Tensor.mul,
        torch.Tensor.multiply,
        torch.Tensor.sub,
        torch.Tensor.subtract,
    )

    def __call__(self, proceed: Function, *args: Any, **kwargs: Any) -> Any:
        """See `Rewrite`."""
        joined = bool(args) and isinstance(args[0], (list, tuple))
        operands = args[0] if joined else args[:2]
        low = self._cast_low(operands, join=joined)
        if low is None:
            return proceed(*args, **kwargs)
        self.count += 1
        rest = args[1:] if joined else args[2:]
        return proceed(low, *rest, **kwargs) if joined else proceed(*low, *rest, **kwargs)

    def _cast_low(self, operands: Sequence[Any], *, join: bool) -> list[Tensor] | None:
        """The operands, all of one type; None where that is not for this pass to do."""
        if len(operands) < 2 or not all(isinstance(one, Tensor) for one in operands):
            return None
        target = autocast_type(operands[0])
        wide = [one for one in operands if one.dtype != target]
        if target is None or not wide or len(wide) == len(operands):
            return None
        if not all(one.dtype == torch.float32 and one in self.parameters for one in wide):
            return None
        shapes: Any = torch.broadcast_shapes
        shape = None if join else shapes(*(one.shape for one in operands))
        return [one if one.dtype == target else _cast(one, target, shape) for one in operands]


def _cast(parameter: Tensor, target: torch.dtype, shape: torch.Size | None) -> Tensor:
    return (parameter if shape is None else parameter.expand(shape)).to(target)
