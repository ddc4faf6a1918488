"""Layers that are computed again in the backward pass: the same training, and what is refused.

That memory falls is in `tests/preflight/test_remat.py`, meshes are in `test_mesh.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.gpt import GPTJob
from jobs.stack import run_layers
from runner.backends.base import Recipe
from runner.backends.passes.pipeline import Passes
from runner.backends.passes.rewrite import Held
from runner.backends.registry import build
from runner.backends.step.layers import LayerFunction
from runner.config.schema import PassesConfig
from runner.record.errors import ConfigError
from runner.record.events import GraphRecord
from tests.backends import problems

STEPS = 4


def gpt(*, dropout: float = 0.0, double: bool = False, **changes: Any) -> Recipe:
    settings = {"depth": 3, "width": 32, "heads": 2, "dropout": dropout, "positions": "rotary"}
    facts = {"vocabulary": 32, "seq_len": 16, "heldout_tokens": 100, "heldout_bytes": 400}
    job = GPTJob(settings, facts)
    torch.manual_seed(0)
    model = job.build().double() if double else job.build()
    return Recipe(model, job.loss, job.evaluate, problems.adamw, **changes)


def batch(step: int) -> dict[str, Tensor]:
    text = torch.randint(32, (8, 17), generator=torch.Generator().manual_seed(step))
    return {"tokens": text[:, :-1].contiguous(), "target": text[:, 1:].contiguous()}


def trained(recipe: Recipe, **options: Any) -> tuple[list[float], GraphRecord]:
    """Losses and gradient norms of some steps, and what was compiled."""
    records: list[GraphRecord] = []
    backend = build(
        "openxla_step",
        recipe,
        on_start=lambda role: None,
        on_record=records.append,
        strict=True,
        **options,
    )
    each, seen = backend.steps_per_call, []
    for step in range(0, STEPS, each):
        batches = [backend.place(batch(step + k)) for k in range(each)]
        metrics = backend.train_steps(batches, step=step, lrs=[0.003] * each)
        seen += [*metrics["loss"].reshape(-1).tolist(), *metrics["grad_norm"].reshape(-1).tolist()]
    (record,) = records
    return seen, record


@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": 0.3}, {"accumulate": 2, "clip_norm": 0.1}],
    ids=["plain", "dropout", "accumulated"],
)
def test_training_is_the_same(changes: dict[str, Any]) -> None:
    """With dropout this holds only if the second forward pass has the first one's masks.

    In float64, because AdamW amplifies float32's rounding, which differs from program to program.
    """
    kept, once = trained(gpt(double=True, **changes))
    again, twice = trained(gpt(double=True, remat=True, **changes))
    assert again == pytest.approx(kept, rel=1e-7)
    assert twice.nodes > 1.2 * once.nodes


def test_bf16_is_bf16_the_second_time_too() -> None:
    """The first loss and gradient norm: AdamW amplifies the rounding of bf16 in what follows."""
    changes = {"autocast": torch.bfloat16, "passes": PassesConfig(embeddings=True)}
    kept, _ = trained(gpt(**changes))
    again, record = trained(gpt(remat=True, **changes))
    assert again[:2] == pytest.approx(kept[:2], rel=2**-9)
    assert record.passes["norms"] == 2 * 3 * 2 + 1


def test_it_works_with_several_updates_in_one_program() -> None:
    one, _ = trained(gpt(remat=True))
    some, _ = trained(gpt(remat=True), steps_per_call=STEPS)
    assert some[:STEPS] == pytest.approx(one[::2], rel=1e-5)


def test_it_works_with_the_labels_of_a_profile() -> None:
    plain, _ = trained(gpt(remat=True))
    labelled, _ = trained(gpt(remat=True), labelled=True)
    assert labelled == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("given", [True, False])
def test_a_convolution_reads_the_same_both_times(given: bool) -> None:
    """Whether the layer is given the batch itself or what another one made of it."""
    passes, x = Passes(PassesConfig()), torch.randn(2, 3, 8)
    passes.batch.hold([x] if given else [])
    convolution = nn.Conv1d(3, 3, 3, padding=1)
    layer = LayerFunction(lambda layer, x: x + layer(x), convolution, Held())
    tensors = [x, *convolution.parameters()]
    with passes.rewriting():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            first = layer.first(tensors)
        again = layer.again([one.detach() for one in tensors])
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_a_model_without_layers_that_repeat_is_refused() -> None:
    backend = problems.start("openxla_step", problems.recipe(remat=True))
    with pytest.raises(ConfigError, match="remat must be none with a job whose model has no"):
        backend.train_step(backend.place(problems.batch(0)), step=0, lr=0.1)


class Normed(nn.Module):
    """A stack of layers, each of which changes its running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.head = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(run_layers(self.layers, images).mean((2, 3)))
        return output


def test_layers_that_change_their_buffers_are_refused() -> None:
    recipe = dataclasses.replace(problems.recipe(remat=True), model=Normed())
    backend = problems.start("openxla_step", recipe)
    with pytest.raises(ConfigError, match="layers that change their buffers: BatchNorm2d does"):
        backend.train_step(backend.place(problems.batch(0)), step=0, lr=0.1)
