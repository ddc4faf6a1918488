"""Backends that work in place: they own a module and an optimizer and run a plain PyTorch step.

Forward and loss, backward, clipping and the optimizer are the user's own PyTorch; the
subclasses say where it runs, what of it is compiled, and what ends a step.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.backends.base import Backend, Batch, Metrics, Recipe, masked_sums, micro_batches
from runner.backends.compiles import CompileLog
from runner.backends.optimizer import initial_state, set_lr
from runner.backends.state import TrainState, view
from runner.record.errors import CheckpointError


class InPlaceBackend(Backend, abc.ABC):
    """A module and an optimizer on a device, and a step that changes them.

    Args:
        recipe: What to compute.
        log: Where compiled graphs are recorded.
        device: Where parameters, state and batches live.
    """

    def __init__(self, recipe: Recipe, *, log: CompileLog, device: torch.device) -> None:
        super().__init__(recipe, log=log)
        self.device = device
        rehearsal = recipe.make_optimizer(recipe.model)
        rehearsal.state.update(initial_state(rehearsal))
        self.model, self.optimizer = self.start(recipe, rehearsal)
        self._params = [p for g in self.optimizer.param_groups for p in g["params"]]
        self._share = torch.tensor(1.0 / recipe.accumulate).to(device)

    def start(self, recipe: Recipe, rehearsal: Optimizer) -> tuple[nn.Module, Optimizer]:
        """The recipe's model on the device, and its optimizer with its first state.

        Args:
            recipe: Its model, on the host, is taken.
            rehearsal: An optimizer over that model, with state.
        """
        model = move(recipe.model, lambda tensor: tensor.detach().to(self.device))
        optimizer = recipe.make_optimizer(model)
        optimizer.load_state_dict(rehearsal.state_dict())
        return model, optimizer

    def forward(self, batch: Batch) -> Tensor:
        """Forward and loss, in the precision asked for."""
        with self.recipe.autocast_on(self.device.type):
            return self.recipe.loss(self.model, batch)

    def metrics(self, batch: Batch, mask: Tensor) -> Metrics:
        """Held-out metrics, summed over the examples that count."""
        with self.recipe.autocast_on(self.device.type):
            return masked_sums(self.recipe.evaluate(self.model, batch), mask)

    def update(self, forward: Callable[[Batch], Tensor], batch: Batch, *, lr: float) -> Metrics:
        """The whole step: gradients of all micro-batches, clipping, the optimizer."""
        parts = micro_batches(batch, self.recipe.accumulate)
        losses = []
        for part in parts:
            loss = forward(part)
            # A prepared gradient: the one that autograd makes is a pending lazy tensor,
            # for which the bridge would block before every backward program.
            loss.backward(self._share)  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        norm = self._clip()
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        return {"loss": loss.float(), "grad_norm": norm}

    def _clip(self) -> Tensor:
        grads = [p.grad for p in self._params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=False)
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self._params, self.recipe.clip_norm, norm, foreach=False
            )
        return norm

    def state(self, step: int) -> TrainState:
        """The module's and the optimizer's own tensors."""
        return view(self.model, self.optimizer, step=step)

    def load(self, state: TrainState) -> None:
        """Copy a saved state into the module and the optimizer.

        Raises:
            CheckpointError: Names or shapes differ from this model's and optimizer's.
        """
        self.check(state)
        with torch.no_grad():
            for group, tensors in self.state(state.step).groups().items():
                saved = state.groups()[group]
                values = self.upload(group, {name: saved[name] for name in tensors})
                for tensor, value in zip(tensors.values(), values, strict=True):
                    tensor.copy_(value)

    def check(self, state: TrainState) -> None:
        """Raises CheckpointError if names or shapes differ from this model's and optimizer's."""
        for group, tensors in self.state(state.step).groups().items():
            saved = state.groups()[group]
            check_names(group, set(tensors), set(saved))
            for name, tensor in tensors.items():
                check_shape(f"{group}/{name}", tensor, saved[name])

    def upload(self, group: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Host tensors of a group of the state, by name, on the device."""
        return list(tensors.values())


def check_names(group: str, own: set[str], saved: set[str]) -> None:
    """Check that a checkpoint's group holds exactly the tensors that are needed.

    Raises:
        CheckpointError: It does not.
    """
    if own != saved:
        missing, extra = sorted(own - saved), sorted(saved - own)
        raise CheckpointError(
            f"the checkpoint's {group} must match the model's: "
            f"missing {missing[:3] or 'none'}, not known {extra[:3] or 'none'}"
        )


def check_shape(name: str, own: Tensor, saved: Tensor) -> None:
    """Check that a saved tensor fits in place of this one.

    Raises:
        CheckpointError: It does not.
    """
    if own.shape != saved.shape:
        raise CheckpointError(
            f"the checkpoint's {name} must have shape {list(own.shape)} as in the model; "
            f"got {list(saved.shape)}"
        )


def move(module: nn.Module, moved_to: Callable[[Tensor], Tensor]) -> nn.Module:
    """Move a module's tensors in place by `moved_to`, parameters that are shared staying shared.

    `nn.Module.to` makes a new parameter for every place where one is used when the target
    is an XLA device, which would untie tied weights.
    """
    moved: dict[int, Tensor] = {}
    for child in module.modules():
        for name, param in list(child.named_parameters(recurse=False, remove_duplicate=False)):
            if id(param) not in moved:
                on_device = moved_to(param)
                moved[id(param)] = nn.Parameter(on_device, requires_grad=param.requires_grad)
            setattr(child, name, moved[id(param)])
        for name, buffer in list(child.named_buffers(recurse=False, remove_duplicate=False)):
            if id(buffer) not in moved:
                moved[id(buffer)] = moved_to(buffer)
            setattr(child, name, moved[id(buffer)])
    return module
