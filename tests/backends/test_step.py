"""The whole step as one program: what it takes, what it refuses, what it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.backends.base import Backend, Recipe
from runner.backends.openxla_step import OpenXlaStep
from runner.backends.registry import build
from runner.backends.step.trace import UntraceableStepError
from runner.config import names
from runner.record.events import GraphRecord
from runner.train.clock import StepClock
from runner.xla import counters
from tests.backends import problems

ROWS, WIDTH, CLASSES = 8, 6, 3
#: What an optimizer needs besides a rate to show all of its state.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {"initial_accumulator_value": 0.1},
}
FOREACH = [
    (name, foreach)
    for name, options in names.OPTIMIZERS.items()
    for foreach in ([False, True] if "foreach" in options else [None])
]


class Dense(nn.Module):
    """Two matrices, so that Muon takes it too, and dropout between them."""

    def __init__(self, dropout: float = 0.0, hidden: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(hidden, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(x))))


def dense(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    make_model: Callable[[], nn.Module] = Dense,
    **changes: Any,
) -> Recipe:
    torch.manual_seed(3)
    return Recipe(
        model=make_model(),
        loss=lambda module, batch: F.cross_entropy(module(batch["x"]), batch["y"]),
        evaluate=lambda module, batch: {"sum": module(batch["x"]).sum(1)},
        make_optimizer=make_optimizer,
        **changes,
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def rows(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "x": torch.randn(ROWS, WIDTH, generator=generator),
        "y": torch.randint(0, CLASSES, (ROWS,), generator=generator),
    }


def opened(
    name: str, recipe: Recipe, *, records: list[GraphRecord] | None = None, per_call: int = 1
) -> Backend:
    kept = [] if records is None else records
    return build(
        name,
        recipe,
        on_start=lambda role: None,
        on_record=kept.append,
        strict=False,
        steps_per_call=per_call,
    )


def trained(backend: Backend, rates: Sequence[float], *, first: int = 0) -> list[float]:
    """Losses of a step for each rate, as many a call as the backend makes."""
    losses: list[float] = []
    count = backend.steps_per_call
    for start in range(0, len(rates), count):
        steps = range(first + start, first + start + count)
        batches = [backend.place(rows(step)) for step in steps]
        metrics = backend.train_steps(batches, step=steps[0], lrs=rates[start : start + count])
        losses += metrics["loss"].cpu().reshape(-1).tolist()
    return losses


@pytest.mark.parametrize(("name", "foreach"), FOREACH)
def test_every_optimizer_updates_as_it_does_in_eager(name: str, foreach: bool | None) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        extra = {} if foreach is None else {"foreach": foreach}
        cls = getattr(torch.optim, name)
        optimizer: torch.optim.Optimizer = cls(
            model.parameters(), lr=0.01, **extra, **OPTIONS.get(name, {})
        )
        return optimizer

    rates = [0.02, 0.01, 0.005, 0.03]
    eager, step = opened("eager", dense(make)), opened("openxla_step", dense(make))
    got, expected = trained(step, rates), trained(eager, rates)
    if name == "Muon":
        # It orthogonalises in bfloat16, which makes an update of the noise in the head's
        # gradient: its rows sum to zero, so one of its singular values is nothing else.
        assert got == pytest.approx(expected, rel=1e-3)
        return
    assert got == pytest.approx(expected, rel=2e-6)
    for group, tensors in eager.state(4).groups().items():
        held = problems.host(step.state(4).groups()[group])
        assert set(held) == set(tensors)
        for key, value in tensors.items():
            torch.testing.assert_close(held[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_several_steps_in_one_program_equal_single_ones(dropout: float) -> None:
    rates = [0.02, 0.01, 0.005, 0.03, 1.0, 0.0, 0.01, 0.02]
    single = opened("openxla_step", dense(adamw, lambda: Dense(dropout)))
    several = opened("openxla_step", dense(adamw, lambda: Dense(dropout)), per_call=4)
    assert trained(several, rates) == trained(single, rates)
    one, other = problems.host(single.state(8).params), problems.host(several.state(8).params)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_thousand_rates_take_one_compile_and_one_program_each() -> None:
    records: list[GraphRecord] = []
    backend = opened("openxla_step", dense(adamw, lambda: Dense(hidden=7)), records=records)
    compiles = counters.compiles()[0]
    trained(backend, [0.1])
    assert counters.compiles()[0] - compiles == 1
    started, blocked = backend.programs(), counters.blocking_syncs()
    trained(backend, [1.0 / (1 + step) for step in range(1000)], first=1)
    assert backend.programs() - started == 1000
    assert counters.blocking_syncs() == blocked
    assert counters.compiles()[0] - compiles == 1
    assert [record.role for record in records] == ["step"]


def test_a_step_and_an_evaluation_are_two_compiles() -> None:
    backend = opened("openxla_step", dense(adamw, lambda: Dense(hidden=9)))
    compiles = counters.compiles()[0]
    trained(backend, [0.1, 0.2])
    placed = backend.place({**rows(0), "mask": torch.ones(ROWS)})
    mask = placed.pop("mask")
    backend.eval_step(placed, mask)["sum"].item()
    assert counters.compiles()[0] - compiles == 2


def test_every_byte_that_training_changes_is_donated() -> None:
    backend = opened("openxla_step", problems.recipe(problems.adamw))
    assert isinstance(backend, OpenXlaStep)
    # A size of its own: XLA counts aliases when it compiles, not when it finds a program again.
    backend.train_step(backend.place(problems.batch(0, size=11)), step=0, lr=0.1)
    (program,) = backend._programs.values()
    state = backend.state(1)
    counters_of = [t for name, t in state.optimizer.items() if name.endswith("/step")]
    merged = (len(counters_of) - 1) * counters_of[0].element_size()
    assert sum(t.numel() * t.element_size() for t in backend._carried) == state.bytes() - merged
    assert program.facts.aliases == len(backend._carried)


def test_a_call_is_let_go_of_when_its_end_was_seen() -> None:
    backend = opened("openxla_step", dense(adamw))
    assert isinstance(backend, OpenXlaStep)
    trained(backend, [0.1])
    calls: list[list[weakref.ref[Tensor]]] = []
    with StepClock(backend, on_end=lambda finished: None) as clock:
        for step in (1, 2):
            batch = backend.place(rows(step))
            calls.append([weakref.ref(t) for t in (*backend._carried, *batch.values())])
            metrics = backend.train_step(batch, step=step, lr=0.1)
            clock.launched(step + 1, metrics, host_s=0.0, wait_s=0.0)
        del batch
        clock.drain()
        assert [ref() for refs in calls for ref in refs] == [None] * len(calls[0] + calls[1])


def test_without_a_clock_the_inputs_of_three_calls_are_kept_and_no_more() -> None:
    backend = opened("openxla_step", dense(adamw))
    calls: list[list[weakref.ref[Tensor]]] = []
    for step in range(5):
        batch = backend.place(rows(step))
        calls.append([weakref.ref(tensor) for tensor in batch.values()])
        backend.train_step(batch, step=step, lr=0.1)
    del batch
    assert [calls[i][0]() is None for i in range(5)] == [True, True, False, False, False]


def test_the_models_own_objects_hold_the_state_when_they_are_asked_for() -> None:
    backend = opened("openxla_step", problems.recipe(problems.adamw))
    eager = opened("eager", problems.recipe(problems.adamw))
    assert isinstance(backend, OpenXlaStep)
    for run in (backend, eager):
        problems.losses(run, 3)
    model, optimizer = backend.publish()
    state = problems.host(backend.state(3).groups()["buffers"])
    assert torch.equal(model.norm.running_var, state["norm.running_var"])  # type: ignore[union-attr]
    assert model.again.weight is model.hidden.weight  # type: ignore[union-attr]
    expected = eager.optimizer.state_dict()["state"]  # type: ignore[attr-defined]
    published = optimizer.state_dict()["state"]
    assert published.keys() == expected.keys()
    for number, values in expected.items():
        for key, value in values.items():
            torch.testing.assert_close(published[number][key], value, rtol=1e-4, atol=1e-6)


class Branches(Dense):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if out.sum() > 0 else -out  # the branch


class Reads(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.max().item()  # the reading


class Selects(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[x > 0].sum()  # the selection


class Copies(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.from_numpy(x.numpy()).sum()  # the copy


@pytest.mark.parametrize("model", [Branches, Reads, Selects, Copies])
def test_a_model_that_looks_at_values_is_refused_with_its_line(model: type[Dense]) -> None:
    backend = opened("openxla_step", dense(adamw, model))
    with pytest.raises(UntraceableStepError) as caught:
        trained(backend, [0.1])
    message = str(caught.value)
    assert "test_step.py:" in message
    assert "  # the " in message
    assert "use backend=openxla (graph breaks allowed) or backend=lazy" in message


def test_bf16_autocast_agrees_with_eager_within_its_rounding() -> None:
    work = {"autocast": torch.bfloat16}
    eager, step = (
        opened("eager", dense(adamw, **work)),
        opened("openxla_step", dense(adamw, **work)),
    )
    rates = [0.02] * 3
    plain = trained(opened("eager", dense(adamw)), rates)
    got = trained(step, rates)
    assert got == pytest.approx(trained(eager, rates), rel=1e-2)
    assert got != pytest.approx(plain, rel=1e-6)
