"""What layers in a loop carry: the state that the model has, in stacks of its layers' tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from runner.backends.base import Backend
from runner.backends.sharding import Sharding
from runner.backends.state import TrainState
from runner.backends.step.stacks import Carried, find_stacks, partitions
from runner.config.parallel import Mesh
from runner.record.errors import CheckpointError, ConfigError
from tests.backends import problems
from tests.backends.test_scan import LAYERS, OPTIMIZERS, Layer, Net, recipe, scanned, trained


def state_names(state: TrainState) -> dict[str, set[str]]:
    return {group: set(tensors) for group, tensors in state.groups().items()}


@pytest.mark.parametrize("optimizer", [problems.adamw, OPTIMIZERS["not elementwise"]])
@pytest.mark.parametrize("ways", [(False, True), (True, False)])
def test_a_state_goes_from_one_to_the_other(
    ways: tuple[bool, bool], optimizer: problems.Optim
) -> None:
    def started(looped: bool) -> Backend:
        work = recipe(optimizer=optimizer)
        return problems.start("openxla_step", scanned(work) if looped else work)

    one, other = (started(looped) for looped in ways)
    trained(one)
    state = problems.saved(one.state(3))
    assert state_names(state) == state_names(other.state(0))
    other.load(state)
    assert trained(other, first=3) == pytest.approx(trained(one, first=3), rel=1e-9)


def test_a_snapshot_has_each_layers_tensors() -> None:
    backend = problems.start("openxla_step", scanned(recipe()))
    trained(backend)
    snapshot, state = backend.snapshot(3), backend.state(3)
    whole = {f"{g}/{name}": t for g, own in state.groups().items() for name, t in own.items()}
    assert set(snapshot.tensors) == set(whole)
    for name, tensor in snapshot.tensors.items():
        (piece,) = tensor.pieces
        assert torch.equal(piece.values, whole[name]), name


def test_model_and_optimizer_are_published() -> None:
    kept = problems.start("openxla_step", recipe())
    looped = problems.start("openxla_step", scanned(recipe()))
    trained(kept), trained(looped)
    (model, optimizer), (own, other) = kept.publish(), looped.publish()  # type: ignore[attr-defined]
    for (name, ours), theirs in zip(own.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
        for key, value in optimizer.state[theirs].items():
            torch.testing.assert_close(other.state[ours][key], value, msg=f"{name}/{key}")
    assert [len(g["params"]) for g in other.param_groups] == [
        len(g["params"]) for g in optimizer.param_groups
    ]


def test_counters_that_differ_cannot_be_carried_once() -> None:
    backend = problems.start("openxla_step", scanned(recipe()))
    state = problems.saved(backend.state(0))
    state.optimizer["layers.2.up.weight/step"].fill_(5)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"layers\.2\.up\.weight/step is 5"):
        backend.load(state)


def test_what_lies_in_stacks() -> None:
    """Each tensor of a layer; not lists of single operations, nor what has two names."""
    model = Net()
    model.tables = nn.ModuleList(nn.Embedding(3, 2) for _ in range(2))
    assert isinstance(model.layers[3], Layer)
    assert isinstance(model.layers[0], Layer)
    model.layers[3].norm.bias = model.head.bias = model.layers[0].norm.bias
    found = find_stacks(model)
    own = ["norm.weight", "up.weight", "up.bias", "down.weight", "scale"]
    assert list(found) == [f"layers.*.{name}" for name in own]
    assert found["layers.*.scale"] == tuple(f"layers.{i}.scale" for i in range(LAYERS))


def test_layers_are_never_cut_from_each_other() -> None:
    members = ("layers.0.w", "layers.1.w")
    carried = [Carried("params", members, "layers.*.w")]
    sharding = Sharding(Mesh({"fsdp": 2}))
    assert partitions(carried, [(2, 4, 6)], sharding) == [((), (), ("fsdp",))]
    uneven = Sharding(Mesh({"fsdp": 2}), {r"layers\.0\.w": ("fsdp", None)})
    with pytest.raises(ConfigError, match="sharding rules that differ from layer to layer"):
        partitions(carried, [(2, 4, 6)], uneven)
