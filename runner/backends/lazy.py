"""torch_xla's lazy tensors: the step is traced anew every time, one sync hands it over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.backends.base import Batch, Metrics, Recipe
from runner.backends.compiles import CompileLog
from runner.backends.inplace import InPlaceBackend, move
from runner.backends.placement import open_placement
from runner.backends.sharding import ONE_DEVICE, Partition, Sharding
from runner.backends.state import TrainState, view
from runner.xla import counters, device
from runner.xla.program import upload


class XlaInPlaceBackend(InPlaceBackend):
    """What `lazy` and `openxla` share: an XLA device, and a sync at the end of a step."""

    def __init__(self, recipe: Recipe, *, log: CompileLog) -> None:
        super().__init__(recipe, log=log, device=device.open_device())
        device.sync()

    def place(self, batch: Batch) -> dict[str, Tensor]:
        """See `Backend.place`."""
        return device.place(batch, self.device)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Backend.to_host`."""
        copies = device.to_host([tensor.detach() for tensor in tensors])
        # An optimizer keeps its step counters on the host, and counts them up in place.
        return [
            copy.clone() if tensor.device.type == "cpu" else copy
            for tensor, copy in zip(tensors, copies, strict=True)
        ]

    def upload(self, group: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """See `InPlaceBackend.upload`; no two share a buffer, which a step would overwrite."""
        return upload(list(tensors.values()))

    def load(self, state: TrainState) -> None:
        """See `Backend.load`."""
        super().load(state)
        # Left pending, the copies would become a part of the first step's graph.
        device.sync()

    def programs(self) -> int:
        """See `Backend.programs`."""
        return counters.programs()

    @staticmethod
    def compile_totals() -> tuple[int, float]:
        """See `Backend.compile_totals`."""
        return counters.compiles()

    def memory_bytes(self) -> int:
        """See `Backend.memory_bytes`."""
        return device.memory_bytes(self.device) or super().memory_bytes()


class Lazy(XlaInPlaceBackend):
    """Forward, backward and optimizer as one lazy graph.

    Args:
        recipe: What to compute.
        log: Where compiled graphs are recorded.
        sharding: The devices and what lies how on them.
    """

    def __init__(self, recipe: Recipe, *, log: CompileLog, sharding: Sharding = ONE_DEVICE) -> None:
        self._sharding, self._placement = sharding, open_placement(sharding)
        self._lying: dict[str, Partition] = {}
        super().__init__(recipe, log=log)

    def start(self, recipe: Recipe, rehearsal: Optimizer) -> tuple[nn.Module, Optimizer]:
        """See `InPlaceBackend.start`; each device gets its own part of a tensor only."""
        if not self._sharding.mesh.axes:
            return super().start(recipe, rehearsal)
        named = _named(view(recipe.model, rehearsal, step=0))
        names = [(group, name) for group, _, name in (one.partition("/") for one in named)]
        lying = self._sharding.carried(names, [tensor.shape for tensor in named.values()])
        self._lying = dict(zip(named, lying, strict=True))
        uploaded = self._placement.upload(list(named.values()), lying)
        placed = {id(old): new for old, new in zip(named.values(), uploaded, strict=True)}
        states = dict(rehearsal.state)
        before = [p for group in rehearsal.param_groups for p in group["params"]]
        model = move(recipe.model, lambda tensor: placed[id(tensor)])
        optimizer = recipe.make_optimizer(model)
        after = [p for group in optimizer.param_groups for p in group["params"]]
        for old, new in zip(before, after, strict=True):
            # As in `Optimizer.load_state_dict`, counters of steps stay on the host.
            optimizer.state[new] = {
                key: value if key == "step" else placed.get(id(value), value)
                for key, value in states.get(old, {}).items()
            }
        return model, optimizer

    def place(self, batch: Batch) -> dict[str, Tensor]:
        """See `Backend.place`."""
        return self._placement.place(batch)

    def upload(self, group: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """See `InPlaceBackend.upload`."""
        if not self._lying:
            return super().upload(group, tensors)
        lying = [self._lying[f"{group}/{name}"] for name in tensors]
        return self._placement.upload(list(tensors.values()), lying)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Backend.to_host`."""
        if not self._lying:
            return super().to_host(tensors)
        on_mesh = [tensor.detach() for tensor in tensors if tensor.device.type != "cpu"]
        copies = iter(self._placement.to_host(on_mesh))
        return [t.clone() if t.device.type == "cpu" else next(copies) for t in tensors]

    def load(self, state: TrainState) -> None:
        """See `Backend.load`; on a mesh what was uploaded takes the place of what was there."""
        if not self._lying:
            super().load(state)
            return
        own = _named(self.state(state.step))
        self.check(state)
        for group, tensors in state.groups().items():
            for (name, tensor), value in zip(
                tensors.items(), self.upload(group, tensors), strict=True
            ):
                old = own[f"{group}/{name}"]
                # Counters on the host are counted up in place: the saved ones stay as they are.
                old.data = tensor.clone() if old.device.type == "cpu" else value

    def _pin(self) -> None:
        """An update's results lie as what they replace; else XLA compiles anew for them."""
        named = _named(self.state(0)) if self._lying else {}
        kept = {name: tensor for name, tensor in named.items() if tensor.device.type != "cpu"}
        self._placement.pin(list(kept.values()), [self._lying[name] for name in kept])

    def train_step(self, batch: Batch, *, step: int, lr: float) -> Metrics:
        """See `Backend.train_step`."""
        device.manual_seed(self.recipe.step_seed(step))
        self.model.train()
        with self.log.watch("step", list(batch.values())):
            metrics = self.update(self.forward, batch, lr=lr)
            self._pin()
            device.sync()
        self.log.warmed("step")
        return metrics

    @torch.no_grad()
    def eval_step(self, batch: Batch, mask: Tensor) -> Metrics:
        """See `Backend.eval_step`."""
        self.model.eval()
        with self.log.watch("eval", [*batch.values(), mask]):
            metrics = self.metrics(batch, mask)
            device.sync()
        self.log.warmed("eval")
        return metrics


def _named(state: TrainState) -> dict[str, Tensor]:
    """A state's tensors by `<group>/<name>`."""
    groups = state.groups().items()
    return {f"{group}/{name}": tensor for group, own in groups for name, tensor in own.items()}
