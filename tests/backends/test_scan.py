"""Layers in a loop: the same training and the same state, whatever the layers and the optimizer.

What the TPU compiler makes of it is in `tests/preflight/test_scan.py`, meshes are in
`test_mesh.py`, the jobs that ship in `tests/jobs/test_backends.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.stack import run_layers
from runner.backends.base import Backend, Batch, Recipe
from runner.backends.registry import build
from runner.backends.step.trace import UntraceableStepError
from runner.record.errors import ConfigError
from runner.record.events import GraphRecord
from tests.backends import problems

WIDTH, LAYERS, BATCH = 8, 4, 16


class Layer(nn.Module):
    """A little of everything that a layer may have."""

    scale: Tensor

    def __init__(self, number: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.number, self.dropout = number, dropout
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.register_buffer("scale", torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        inside = self.down(F.gelu(self.up(self.norm(x + shift)))) * self.scale
        return x + F.dropout(inside, self.dropout, self.training)


class Numbered(Layer):
    """A layer whose number is part of what it computes."""

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return super().forward(x, shift) / (self.number + 1)


class Net(nn.Module):
    """Layers between two linear ones, with a trained input that all of them share."""

    def __init__(self, make: Callable[[int], nn.Module] = Layer, layers: int = LAYERS) -> None:
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.layers = nn.ModuleList(make(number) for number in range(layers))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(run_layers(self.layers, self.first(x), self.shift))
        return y


class InTwoParts(Net):
    """The same layers, run in two stacks, and looked at besides."""

    def forward(self, x: Tensor) -> Tensor:
        x = run_layers(self.layers[:1], self.first(x), self.shift)
        x = run_layers(self.layers[1:], x, self.shift)
        weights = [layer.up.weight.square().mean() for layer in self.layers]
        y: Tensor = self.head(x) + torch.stack(weights).sum()
        return y


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def recipe(
    net: Callable[[], nn.Module] = Net, optimizer: problems.Optim = problems.adamw, **changes: Any
) -> Recipe:
    """In float64, because optimizers amplify rounding, which differs from program to program."""
    torch.manual_seed(0)
    return Recipe(
        net().double(), squares, lambda model, batch: {"y": model(batch["x"])}, optimizer, **changes
    )


def scanned(work: Recipe) -> Recipe:
    return dataclasses.replace(work, remat=True, scan_layers=True)


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "y": x.sum(1, keepdim=True)}


def trained(backend: Backend, *, first: int = 0, steps: int = 3) -> list[float]:
    """Losses and gradient norms."""
    seen = []
    for step in range(first, first + steps):
        placed = backend.place(batch(step))
        metrics = backend.train_step(placed, step=step, lr=0.01 / (step + 1))
        seen += [metrics["loss"].item(), metrics["grad_norm"].item()]
    return seen


def both(make: Callable[[], Recipe]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms without the loop and with it."""
    kept = trained(problems.start("openxla_step", make(), strict=True))
    return kept, trained(problems.start("openxla_step", scanned(make()), strict=True))


@pytest.mark.parametrize("net", [Net, InTwoParts])
@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "clip_norm": 0.1}], ids=["plain", "clipped"]
)
def test_training_is_the_same(net: Callable[[], nn.Module], changes: dict[str, Any]) -> None:
    kept, looped = both(lambda: recipe(net, **changes))
    assert looped == pytest.approx(kept, rel=1e-9)


def sparse_decay(model: nn.Module) -> torch.optim.Optimizer:
    """A group of its own for the first layer: its stacks would have two groups."""
    own = [p for name, p in model.named_parameters() if name.startswith("layers.0.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("layers.0.")]
    return torch.optim.AdamW([{"params": own, "weight_decay": 0.5}, {"params": rest}], lr=0.01)


def half_frozen(model: nn.Module) -> torch.optim.Optimizer:
    """Some layers are not trained, and of the others not all of their parameters."""
    assert isinstance(model, Net)
    model.layers[0].requires_grad_(False)
    for layer in model.layers:
        layer.get_submodule("norm").requires_grad_(False)
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


OPTIMIZERS: dict[str, problems.Optim] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01),
    "not elementwise": lambda model: torch.optim.Muon(matrices(model), lr=0.01),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.01),
    "two groups": sparse_decay,
    "half frozen": half_frozen,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_does_the_same(name: str) -> None:
    kept, looped = both(lambda: recipe(optimizer=OPTIMIZERS[name]))
    assert kept[0] != kept[2]
    assert looped == pytest.approx(kept, rel=1e-7)


def test_the_program_does_not_grow_with_the_layers() -> None:
    nodes = []
    for layers in (2, 6):
        records: list[GraphRecord] = []
        work = scanned(recipe(lambda layers=layers: Net(layers=layers)))
        trained(problems.start("openxla_step", work, records=records), steps=1)
        nodes.append([record.nodes for record in records])
    assert nodes[0] == nodes[1]


def test_the_gradient_is_that_of_the_masks_that_were_drawn() -> None:
    """Along its own direction: a small step changes the loss by what the gradient says.

    With other masks on the way back, or in the second look at the loss, it would not.
    """
    work = scanned(recipe(lambda: Net(lambda n: Layer(n, dropout=0.5)), problems.sgd))
    backend = problems.start("openxla_step", work)
    rate = 1e-5
    seen = [backend.train_step(backend.place(batch(0)), step=0, lr=rate) for _ in range(2)]
    before, after = (metrics["loss"].item() for metrics in seen)
    assert (before - after) / rate == pytest.approx(seen[0]["grad_norm"].item() ** 2, rel=0.01)


class Adds(nn.Module):
    """A layer that adds 2 or 0 to each number, at random."""

    def __init__(self, _: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)

    def forward(self, x: Tensor, one: Tensor) -> Tensor:
        return x + F.dropout(one.expand(x.shape), 0.5) + 0 * self.inner.weight


class Counts(Net):
    """The share of numbers to which just one of two layers added something."""

    def __init__(self) -> None:
        super().__init__(Adds, layers=2)

    def forward(self, x: Tensor) -> Tensor:
        ends = run_layers(self.layers, torch.zeros_like(x), torch.ones_like(x[:1, :1]))
        return (ends == 2).double().mean() + 0 * self.head.weight.sum()


def test_each_layer_and_each_step_draws_numbers_of_its_own() -> None:
    work = dataclasses.replace(
        scanned(recipe(Counts, problems.sgd)), loss=lambda model, batch: model(batch["x"])
    )
    backend = problems.start("openxla_step", work)
    found = trained(backend, steps=4)[::2]
    assert all(0.1 < share < 0.9 for share in found)
    assert len(set(found)) > 1


def test_several_updates_in_one_program_are_those_of_one_by_one() -> None:
    """A loop of layers in a loop of updates, each layer and update with draws of its own."""

    def losses(steps_per_call: int) -> list[float]:
        backend = build(
            "openxla_step",
            scanned(recipe(lambda: Net(lambda n: Layer(n, dropout=0.3)))),
            on_start=lambda role: None,
            on_record=lambda record: None,
            strict=True,
            steps_per_call=steps_per_call,
        )
        found = []
        for step in range(0, 4, steps_per_call):
            batches = [backend.place(batch(step + k)) for k in range(steps_per_call)]
            metrics = backend.train_steps(batches, step=step, lrs=[0.01] * steps_per_call)
            found += metrics["loss"].reshape(-1).tolist()
        return found

    assert losses(4) == pytest.approx(losses(1), rel=1e-6)


@pytest.mark.parametrize("wide", [True, False])
def test_numbered_layers_pass_if_they_do_not_compute_with_the_number(wide: bool) -> None:
    make = Layer if wide else Numbered
    backend = problems.start("openxla_step", scanned(recipe(lambda: Net(make))))
    if wide:
        trained(backend, steps=1)
        return
    with pytest.raises(ConfigError, match=r"layer 3 has number 3, where layer 0 has 0"):
        trained(backend, steps=1)


def test_layers_that_differ_are_refused_by_name() -> None:
    work = scanned(recipe(lambda: Net(lambda n: Layer(0, dropout=0.1 * (n == 2)))))
    backend = problems.start("openxla_step", work)
    words = "scan_layers must be false .* layer 2 has dropout 0.1, where layer 0 has 0.0"
    with pytest.raises(ConfigError, match=words):
        trained(backend, steps=1)


class Wider(Layer):
    """A layer whose output has another type than its input."""

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return super().forward(x, shift).float()


def test_layers_whose_output_is_not_as_their_input_are_refused() -> None:
    backend = problems.start("openxla_step", scanned(recipe(lambda: Net(Wider))))
    with pytest.raises(ConfigError, match=r"Wider makes float32\[16, 8\] of float64\[16, 8\]"):
        trained(backend, steps=1)


class Idle(Layer):
    """A layer with a parameter that it does not use: weight decay must not change it."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(number)
        self.unused = nn.Linear(WIDTH, WIDTH)


def test_parameters_without_gradients_are_left_alone() -> None:
    backend = problems.start("openxla_step", scanned(recipe(lambda: Net(Idle))))
    before = problems.host(backend.state(0).params)
    kept, looped = both(lambda: recipe(lambda: Net(Idle)))
    assert looped == pytest.approx(kept, rel=1e-9)
    trained(backend)
    after = problems.host(backend.state(3).params)
    assert torch.equal(before["layers.1.unused.weight"], after["layers.1.unused.weight"])
    assert not torch.equal(before["layers.1.up.weight"], after["layers.1.up.weight"])


def test_an_input_that_is_not_handed_to_the_layers_is_named() -> None:
    class Closed(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            outside = y.mean()

            def call(layer: nn.Module, x: Tensor, shift: Tensor) -> Tensor:
                out: Tensor = layer(x, shift)
                return out + outside

            out: Tensor = self.head(run_layers(self.layers, y, self.shift, call=call))
            return out

    backend = problems.start("openxla_step", scanned(recipe(Closed)))
    with pytest.raises(UntraceableStepError, match=r"hand it to jobs\.stack\.run_layers"):
        trained(backend, steps=1)


def evaluated(backend: Backend) -> Tensor:
    mask = torch.ones(BATCH, 1, dtype=torch.float64)
    placed = backend.place({**batch(9), "mask": mask})
    return backend.eval_step(placed, placed.pop("mask"))["y"].cpu()


def test_evaluation_is_the_same_before_and_after_training() -> None:
    kept = problems.start("openxla_step", recipe())
    looped = problems.start("openxla_step", scanned(recipe()))
    torch.testing.assert_close(evaluated(looped), evaluated(kept))
    trained(kept), trained(looped)
    torch.testing.assert_close(evaluated(looped), evaluated(kept))
