"""Let Python code that wants a number work with a 0-d tensor instead.

`torch.optim` hands a learning rate or a step count to arguments that are numbers in torch's
signatures (`alpha=`, `value=`), or asks for `.item()`. Inside a traced step both are tensors.
Owns: the rewriting of those few calls. Refuses to know: which optimizer makes them.
"""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_Call = Callable[..., Any]
_SUMS = {
    torch.Tensor.add_,
    torch.Tensor.sub_,
    torch.Tensor.add,
    torch.Tensor.sub,
    torch.add,
    torch.sub,
}
_PRODUCTS: dict[_Call, tuple[_Call, _Call]] = {
    torch.Tensor.addcmul_: (torch.Tensor.add_, torch.mul),
    torch.Tensor.addcdiv_: (torch.Tensor.add_, torch.div),
    torch.Tensor.addcmul: (torch.add, torch.mul),
    torch.Tensor.addcdiv: (torch.add, torch.div),
}


class TensorsAsNumbers(TorchFunctionMode):
    """While active, 0-d tensors may stand where torch's signatures want a number."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.item:
            return args[0]
        if func in _SUMS and isinstance(kwargs.get("alpha"), torch.Tensor):
            return func(args[0], args[1] * kwargs["alpha"])
        if func in _PRODUCTS and isinstance(kwargs.get("value"), torch.Tensor):
            add, combine = _PRODUCTS[func]
            return add(args[0], combine(args[1], args[2]) * kwargs["value"])
        return func(*args, **kwargs)


@contextlib.contextmanager
def traced_extrema(names: dict[str, Any]) -> Iterator[None]:
    """Gives one module a `min` and `max` that do not ask a traced tensor which one is smaller.

    Args:
        names: The global names of the module.
    """
    own = {name: names[name] for name in ("min", "max") if name in names}
    names["min"] = _extremum(builtins.min, elementwise=torch.minimum, limit="max")
    names["max"] = _extremum(builtins.max, elementwise=torch.maximum, limit="min")
    try:
        yield
    finally:
        del names["min"], names["max"]
        for name, function in own.items():
            names[name] = function


def _extremum(plain: _Call, *, elementwise: _Call, limit: str) -> _Call:
    def choose(*values: Any, **options: Any) -> Any:
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if len(values) != 2 or not tensors:
            return plain(*values, **options)
        if len(tensors) == 2:
            return elementwise(*tensors)
        number = next(value for value in values if not isinstance(value, torch.Tensor))
        return torch.clamp(tensors[0], **{limit: number})

    return choose
