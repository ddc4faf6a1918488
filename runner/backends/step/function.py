"""A training step as a function of flat tensors, made to be traced.

Owns the order of a step's inputs and outputs. It does not know how a graph is made of it, nor
where the tensors live.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from jobs.stack import RunLayers
from runner.backends.base import Batch, Metrics, Recipe, dealt, masked_sums
from runner.backends.optimizer import initial_state
from runner.backends.passes.pipeline import Passes
from runner.backends.sharding import ONE_DEVICE
from runner.backends.step.activations import Activations
from runner.backends.step.cpu_norms import WHOLE_NORMS, Decompositions
from runner.backends.step.layers import InTurn, run_by
from runner.backends.step.layout import is_small, lay, stand
from runner.backends.step.optimizer import FunctionalOptimizer
from runner.backends.step.remat import Remat
from runner.backends.step.scan import Scan
from runner.backends.step.stacks import Carried, Stacks, apart, find_stacks
from runner.config.parallel import Mesh
from runner.xla.barrier import barrier


class _Objective(nn.Module):
    """Loss or metrics as a module's forward, so that `functional_call` can lend it tensors."""

    def __init__(self, recipe: Recipe, device_type: str, run: RunLayers) -> None:
        super().__init__()
        self.model = recipe.model
        self._recipe = recipe
        self._device_type = device_type
        self._run = run

    def forward(self, batch: Batch, mask: Tensor | None) -> Tensor | Metrics:
        with self._recipe.autocast_on(self._device_type):
            if mask is not None:
                with run_by(self._run, needed=self._recipe.scan_layers):
                    return masked_sums(self._recipe.evaluate(self.model, batch), mask)
            with run_by(self._run, needed=self._recipe.remat):
                return self._recipe.loss(self.model, batch)


class StepFunction:
    """Forward, loss, backward, clipping and optimizer over flat tensors.

    Order of inputs: trainable parameters, frozen parameters, buffers, optimizer state, learning
    rates (one a group), batch in the order of its names. Order of outputs: loss, gradient norm,
    then the first four groups again.

    Args:
        recipe: The step; its model stays on the host and is never changed.
        device_type: Where the step will run, for autocast.
        decomposed: What is written out in other operations: see `trace_step`.
        mesh: The devices that it will run on.

    Attributes:
        batch_names: The order of a batch's tensors; to be set before the step is traced.
        names: Names of the model's tensors, in the order of the inputs.
        trainable: How many of them the optimizer changes.
        initial: Host values of everything that is carried from step to step.
        groups: Parameter groups of the optimizer.
        lr_scales: What each group multiplies the learning rate by.
        metric_names: The order of `evaluate`'s outputs, once it was traced.
        passes: What is done to the step while it is traced, and afterwards.
        pack: Whether small tensors may be held and updated side by side: on one device.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        device_type: str,
        decomposed: Decompositions = WHOLE_NORMS,
        mesh: Mesh = ONE_DEVICE.mesh,
    ) -> None:
        self._recipe, self._device_type = recipe, device_type
        self.pack, self.decomposed = True, decomposed
        self.passes = Passes(recipe.passes)
        self.batch_names: list[str] = []
        self._activations = Activations(mesh)
        lie = self._activations.lie
        run = Remat(self.passes.parameters, lie=lie) if recipe.remat else InTurn(lie)
        self._scan: Scan | None = None
        if recipe.scan_layers:
            self._scan = Scan(self.passes, decomposed=decomposed, lie=lie)
        self._objective = _Objective(recipe, device_type, self._scan or run)
        optimizer = recipe.make_optimizer(recipe.model)
        named, buffers = dict(recipe.model.named_parameters()), dict(recipe.model.named_buffers())
        name_of: dict[Tensor, str] = {parameter: name for name, parameter in named.items()}
        self._each = FunctionalOptimizer(optimizer, initial_state(optimizer))
        trained = [name_of[parameter] for parameter in self._each.parameters]
        frozen = [name for name in named if name not in set(trained)]
        self._stacks = self._stacked(named) if recipe.scan_layers else Stacks({})
        rows = [self._stacks.members(name) for name in self._stacks.collapsed(trained)]
        self.functional = self._each.stacked([[named[m] for m in row] for row in rows])
        kinds = [self._stacks.collapsed(names) for names in (trained, frozen, buffers)]
        self.trainable, self._buffers = len(kinds[0]), len(kinds[2])
        self.names = [name for names in kinds for name in names]
        values = {name: tensor.detach() for name, tensor in {**named, **buffers}.items()}
        self.initial = [self._stacks.value(name, values) for name in self.names]
        self.initial += self.functional.state
        self._share(self.initial)
        self.groups = len(optimizer.param_groups)
        self.metric_names: list[str] = []
        self.lr_scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]

    @property
    def carried(self) -> list[Carried]:
        """What every carried tensor is, in order."""
        model = len(self.names) - self._buffers
        kinds = ["params"] * model + ["buffers"] * self._buffers
        found = [
            Carried(kind, self._stacks.members(name), name)
            for kind, name in zip(kinds, self.names, strict=True)
        ]
        for slot in self.functional.slots:
            members = found[slot.parameter].members
            name = f"{self.names[slot.parameter]}/{slot.key}"
            found.append(Carried("optimizer", tuple(f"{m}/{slot.key}" for m in members), name))
        return found

    def _stacked(self, named: Mapping[str, Tensor]) -> Stacks:
        """What can be carried in stacks: buffers, and parameters that are trained alike."""
        places = {parameter: place for place, parameter in enumerate(self._each.parameters)}
        device = torch.device(self._device_type)

        def alike(members: Sequence[str]) -> bool:
            own = [named[name] for name in members if name in named]
            ours = [places[parameter] for parameter in own if parameter in places]
            if len(ours) in (0, len(own)):
                return not ours or self._each.may_stack(ours, device)
            return False

        found = find_stacks(self._recipe.model)
        return Stacks({name: own for name, own in found.items() if alike(own)})

    def _own(self) -> dict[str, Tensor]:
        """The model's parameters and buffers."""
        model = self._recipe.model
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def _share(self, values: Sequence[Tensor]) -> None:
        """Lets the model's tensors lie in the stacks, so that the host holds them once."""
        own = self._own()
        for one, value in zip(self.carried, values, strict=True):
            if one.is_stack and one.group != "optimizer":
                for place, name in enumerate(one.members):
                    own[name].data = value[place]

    @property
    def groups_of(self) -> list[int]:
        """Of every trainable parameter, the number of its group."""
        return [self.functional.group_of(index) for index in range(self.trainable)]

    @property
    def roles(self) -> list[tuple[str, int] | None]:
        """Of every carried tensor, in order, with which others it may lie: see `Layout`."""
        if not self.pack:
            return [None] * len(self.initial)
        groups = self.groups_of
        frozen = len(self.names) - self.trainable - self._buffers
        model = [("parameter", group) for group in groups]
        model += [("frozen", 0)] * frozen + [("buffer", 0)] * self._buffers
        slots = self.functional.slots
        return [*model, *((slot.key, groups[slot.parameter]) for slot in slots)]

    def equal_scalars(self, values: Sequence[Tensor]) -> list[list[int]]:
        """Positions of 0-d optimizer state that is equal under one key.

        Args:
            values: Host values of the carried tensors.
        """
        alike: defaultdict[object, list[int]] = defaultdict(list)
        for offset, slot in enumerate(self.functional.slots):
            position = len(self.names) + offset
            value = values[position]
            if value.dim() == 0:
                alike[slot.key, value.dtype, value.item()].append(position)
        return list(alike.values())

    def publish(self, values: Sequence[Tensor]) -> Optimizer:
        """Puts host values of the carried tensors into the model and the optimizer."""
        groups = apart(self.carried, values)
        own, state = self._own(), groups["optimizer"]
        with torch.no_grad():
            for name, value in {**groups["params"], **groups["buffers"]}.items():
                own[name].copy_(value)
        name_of = {tensor: name for name, tensor in own.items()}
        names = [name_of[parameter] for parameter in self._each.parameters]
        self._each.publish([state[f"{names[s.parameter]}/{s.key}"] for s in self._each.slots])
        return self._each.optimizer

    def __call__(self, *flat: Tensor) -> list[Tensor | None]:
        """One step."""
        held, count = len(self.names), len(self.initial)
        rates, batch = flat[count : count + self.groups], flat[count + self.groups :]
        loss, norm, *rest = self.gradients(*flat[:held], *batch)
        fixed = held - self.trainable
        model_rest, gradients = rest[:fixed], rest[fixed:]
        parameters, state = self.functional.step(
            flat[: self.trainable], gradients=gradients, state=flat[held:count], rates=rates
        )
        return [loss, norm, *parameters, *model_rest, *state]

    def gradients(self, *flat: Tensor) -> list[Tensor | None]:
        """Loss, norm, frozen parameters and buffers after the step, clipped gradients.

        Args:
            flat: The model's tensors, then the batch.
        """
        model, batch = flat[: len(self.names)], flat[len(self.names) :]
        leaves = [tensor.detach().requires_grad_() for tensor in model[: self.trainable]]
        values = dict(zip(self.names, [*leaves, *model[self.trainable :]], strict=True))
        losses: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(leaves)
        for part in zip(*(dealt(one, self._recipe.accumulate) for one in batch), strict=True):
            if losses:
                leaves, sums = _behind(leaves, sums)
                values.update(zip(self.names, leaves, strict=False))
            self._name_parameters(values)
            loss = self._call(values, part)
            assert isinstance(loss, Tensor)
            share = loss / self._recipe.accumulate
            new = torch.autograd.grad(share, leaves, allow_unused=True)
            sums = [_plus(old, gradient) for old, gradient in zip(sums, new, strict=True)]
            losses.append(loss.detach())
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        norm, clipped = self._clip(sums)
        rest = [values[name] for name in self.names[self.trainable :]]
        return [loss.float(), norm, *rest, *clipped]

    def evaluate(self, *flat: Tensor) -> list[Tensor]:
        """Held-out metrics, summed over the examples that count, in the order of their names.

        Args:
            flat: The model's tensors, then a batch, then its mask.
        """
        held = len(self.names)
        values = dict(zip(self.names, flat[:held], strict=True))
        self._name_parameters(values)
        metrics = self._call(values, flat[held:-1], mask=flat[-1])
        assert isinstance(metrics, dict)
        self.metric_names = list(metrics)
        return list(metrics.values())

    def _name_parameters(self, values: dict[str, Tensor]) -> None:
        names = self.names[: len(self.names) - self._buffers]
        self.passes.parameters.hold(values[name] for name in names)

    def _call(
        self, values: dict[str, Tensor], batch: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor | Metrics:
        """The objective with the model's tensors lent; buffers that it changes come back."""
        self._activations.examples = batch[0].shape[0] if batch else 0
        lent: dict[str, Tensor] = {}
        stacks: dict[str, tuple[Tensor, ...]] = {}
        for name, tensor in values.items():
            members = self._stacks.members(name)
            if len(members) > 1:
                stacks[name] = tensor.unbind()
            each = stacks.get(name, (tensor,))
            lent.update((f"model.{m}", one) for m, one in zip(members, each, strict=True))
        if self._scan is not None:
            self._scan.hold([(values[name], layers) for name, layers in stacks.items()])
        self.passes.batch.hold(batch)
        named = dict(zip(self.batch_names, batch, strict=True))
        result: Tensor | Metrics = functional_call(self._objective, lent, (named, mask))
        after = {name.removeprefix("model."): tensor for name, tensor in lent.items()}
        for name in values:
            new = [after[member] for member in self._stacks.members(name)]
            old = stacks.get(name, ())
            if not old or any(a is not b for a, b in zip(new, old, strict=True)):
                values[name] = self._stacks.value(name, after)
        return result

    def _clip(self, gradients: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
        """Global norm, and gradients scaled as `torch.nn.utils.clip_grads_with_norm_` does, if so.

        Gradients are measured and scaled as they are updated: see `Layout`.
        """
        parts = _side_by_side(gradients, pack=self.pack)
        norm = torch.nn.utils.get_total_norm([part for part, _ in parts], foreach=False)
        if self._recipe.clip_norm is None:
            return norm, gradients
        scale = torch.clamp(self._recipe.clip_norm / (norm + 1e-6), max=1.0)
        clipped = list(gradients)
        for part, row in parts:
            scaled = part * scale.to(part.dtype)
            for index, piece in _split(scaled, row, pack=self.pack):
                clipped[index] = piece
        return norm, clipped


_Row = list[tuple[int, torch.Size]]


def _side_by_side(gradients: Sequence[Tensor | None], *, pack: bool) -> list[tuple[Tensor, _Row]]:
    """Large gradients as they lie, small ones of a type in a row; each with index and shape."""
    parts: list[tuple[Tensor, _Row]] = []
    small: defaultdict[torch.dtype, list[tuple[int, Tensor]]] = defaultdict(list)
    for index, gradient in enumerate(gradients):
        if gradient is not None and pack and is_small(gradient):
            small[gradient.dtype].append((index, gradient))
        elif gradient is not None:
            parts.append((lay(gradient) if pack else gradient, [(index, gradient.shape)]))
    for row in small.values():
        flat = torch.cat([gradient.reshape(-1) for _, gradient in row])
        parts.append((flat, [(index, gradient.shape) for index, gradient in row]))
    return parts


def _split(part: Tensor, row: _Row, *, pack: bool) -> list[tuple[int, Tensor]]:
    """Undoes `_side_by_side` for one part."""
    if len(row) == 1 and part.dim() == len(row[0][1]):
        return [(row[0][0], stand(part) if pack else part)]
    pieces = torch.split(part, [shape.numel() for _, shape in row])
    return [(i, piece.reshape(shape)) for (i, shape), piece in zip(row, pieces, strict=True)]


def _behind(
    leaves: Sequence[Tensor], sums: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Parameters that are there once gradients are: one micro-batch waits for the one before.

    Else XLA may have the activations of several in memory at once.
    """
    made = [gradient for gradient in sums if gradient is not None]
    behind = barrier([*(leaf.detach() for leaf in leaves), *made])
    found = iter(behind[len(leaves) :])
    waited = [leaf.requires_grad_() for leaf in behind[: len(leaves)]]
    return waited, [None if gradient is None else next(found) for gradient in sums]


def _plus(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return old if new is None else new
    return old + new
