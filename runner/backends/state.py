"""Everything that training changes, as named tensors.

Random numbers are no part of it: they are functions of seed and step, so the step counter
restores them too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two steps.

    Attributes:
        params: Parameters by their name in the module.
        buffers: Buffers by their name in the module, those that are not saved included.
        optimizer: Optimizer state as `<parameter name>/<state key>`.
        step: Completed optimizer updates.
    """

    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    step: int

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors by group, in the order in which they are saved."""
        return {"params": self.params, "buffers": self.buffers, "optimizer": self.optimizer}

    def bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (tensor for group in self.groups().values() for tensor in group.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter name and state key."""
    return {
        f"{name}/{key}": value
        for name, param in module.named_parameters()
        for key, value in optimizer.state.get(param, {}).items()
        if isinstance(value, Tensor)
    }


def view(module: nn.Module, optimizer: Optimizer, *, step: int) -> TrainState:
    """The state that a module and an optimizer hold now; the tensors are theirs, not copies."""
    return TrainState(
        params=dict(module.named_parameters()),
        buffers=dict(module.named_buffers()),
        optimizer=optimizer_tensors(module, optimizer),
        step=step,
    )


def state_dict_names(module: nn.Module) -> dict[str, str]:
    """Keys of the module's state dict, each with the `<group>/<name>` of its tensor here.

    Buffers that are not saved have no key; tied weights share a tensor.
    """
    named = {
        **{id(tensor): f"buffers/{name}" for name, tensor in module.named_buffers()},
        **{id(tensor): f"params/{name}" for name, tensor in module.named_parameters()},
    }
    state = module.state_dict(keep_vars=True)
    return {key: named[id(tensor)] for key, tensor in state.items() if id(tensor) in named}
