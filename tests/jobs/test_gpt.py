"""GPT as a job: causality, positions, loss and bits per byte by hand, sharding, settings."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jobs.base import DataRequest, SettingError
from jobs.gpt import GPT, Block, GPTJob
from jobs.stack import run_layers
from jobs.text import WindowSource, prose

FACTS = {"vocabulary": 17, "seq_len": 12, "heldout_tokens": 100, "heldout_bytes": 400}
SETTINGS = {"depth": 2, "width": 16, "heads": 2, "dropout": 0.0, "positions": "rotary"}


def gpt(**settings: Any) -> GPTJob:
    return GPTJob({**SETTINGS, **settings}, FACTS)


def built(job: GPTJob) -> GPT:
    torch.manual_seed(0)
    model = job.build()
    assert isinstance(model, GPT)
    return model


def batch_of(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(17, (count, 13), generator=generator)
    return {"tokens": text[:, :-1], "target": text[:, 1:]}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_loss_is_a_scalar_that_reaches_every_parameter(positions: str) -> None:
    job = gpt(positions=positions)
    model = built(job)
    loss = job.loss(model, batch_of(3))
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(17), rel=0.05)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_no_position_sees_what_follows_it(positions: str) -> None:
    model = built(gpt(positions=positions)).eval()
    tokens = batch_of(1)["tokens"]
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 17
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_order_of_earlier_tokens_matters(positions: str) -> None:
    # Through two layers at least: in one, without positions, the sum over keys has no order.
    model = built(gpt(positions=positions)).eval()
    tokens = torch.arange(12)[None]
    swapped = tokens.clone()
    swapped[0, :4] = torch.tensor([3, 1, 0, 2])
    with torch.no_grad():
        last, other = model(tokens)[0, -1], model(swapped)[0, -1]
    assert (last - other).abs().max() > 1e-6


def test_rotary_attention_depends_on_distances_alone() -> None:
    model = built(gpt())
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def turned(x: Tensor, place: int) -> Tensor:
        first, second = x.chunk(2)
        cos, sin = model.cos[place], model.sin[place]
        return torch.cat((first * cos - second * sin, first * sin + second * cos))

    scores = [turned(query, place + 4) @ turned(key, place) for place in (0, 3, 7)]
    torch.testing.assert_close(scores, [scores[0]] * 3)
    assert not torch.isclose(turned(query, 5) @ turned(key, 0), scores[0])


def test_attention_is_the_textbook_formula() -> None:
    torch.manual_seed(0)
    block = built(gpt(positions="learned")).layers[0]
    assert isinstance(block, Block)
    x = torch.randn(1, 5, 16)
    rows = block.qkv.weight.view(2, 3, 8, 16)  # heads, (query, key, value), size, width
    heads = []
    for head in range(2):
        query, key, value = (x[0] @ rows[head, part].T for part in range(3))
        scores = query @ key.T / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(dim=-1) @ value)
    torch.testing.assert_close(block._attend(x, ())[0], torch.cat(heads, dim=1))


def test_embedding_and_head_are_one_parameter() -> None:
    model = built(gpt())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 17 * 16 + 2 * (12 * 16 * 16 + 4 * 16) + 2 * 16


def test_evaluation_gives_bits_for_each_byte_of_each_example() -> None:
    class Fixed(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros(*tokens.shape, 17)

    metrics = gpt().evaluate(Fixed(), batch_of(5))
    assert metrics.pop("predicted").shape == (5, 12)
    assert {name: m.shape for name, m in metrics.items()} == {"loss": (5,), "bits_per_byte": (5,)}
    torch.testing.assert_close(metrics["loss"], torch.full((5,), math.log(17)))
    # The held-out text has four bytes a token.
    torch.testing.assert_close(metrics["bits_per_byte"], torch.full((5,), math.log2(17) / 4))


def test_the_mean_of_evaluation_is_the_loss() -> None:
    job = gpt()
    model = built(job).eval()
    with torch.no_grad():
        metrics, loss = job.evaluate(model, batch_of(6)), job.loss(model, batch_of(6))
    torch.testing.assert_close(metrics["loss"].mean(), loss)


def test_dropout_acts_in_training_only() -> None:
    model, tokens = built(gpt(dropout=0.5)), batch_of(1)["tokens"]
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_sharding_rules_name_each_dimension_of_every_matrix(positions: str) -> None:
    job = gpt(positions=positions)
    for name, parameter in built(job).named_parameters():
        axes = [rule for pattern, rule in job.sharding.items() if re.search(pattern, name)]
        assert len(axes) == (1 if parameter.ndim > 1 else 0), name
        assert all(len(rule) == parameter.ndim for rule in axes)
    for pattern in job.sharding:
        names = dict(built(gpt(positions="learned")).named_parameters())
        assert any(re.search(pattern, name) for name in names), pattern


def test_layers_run_one_after_the_other_with_what_they_share() -> None:
    class Times(nn.Module):
        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return x * factor + 1

    got = run_layers(nn.ModuleList([Times(), Times()]), torch.tensor(1.0), torch.tensor(3.0))
    assert got == 13


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("depth", 0),
        ("width", 1),
        ("width", 18),
        ("heads", 0),
        ("dropout", 1.0),
        ("positions", "sine"),
    ],
)
def test_a_setting_that_breaks_a_rule_is_named(key: str, value: object) -> None:
    with pytest.raises(SettingError, match=rf"model\.{key} must be .*got {value!r}"):
        gpt(**{key: value})


def test_data_of_another_kind_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(SettingError, match=r"needs the data's 'vocabulary'.*classes, channels"):
        GPTJob(SETTINGS, {"classes": 10, "channels": 1})


def test_it_learns_the_prose() -> None:
    data = prose(DataRequest(None, {"seq_len": 64, "mask_fraction": 0.0}, workers=1, seed=0))
    assert data.heldout is not None
    torch.manual_seed(0)
    job = GPTJob({**SETTINGS, "width": 64}, data.facts)
    model = job.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(150):
        arrays = data.train.batch(rng.integers(len(data.train), size=16), rng=rng)
        loss = job.loss(model, {name: torch.from_numpy(a) for name, a in arrays.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    arrays = data.heldout.batch(np.arange(100), rng=None)
    with torch.no_grad():
        metrics = job.evaluate(
            model.eval(), {name: torch.from_numpy(a) for name, a in arrays.items()}
        )
    train, heldout = (
        np.bincount(part.tokens, minlength=256)
        for part in (data.train, data.heldout)
        if isinstance(part, WindowSource)
    )
    by_frequency = -(heldout * np.log2((train + 1) / (train + 1).sum())).sum() / heldout.sum()
    assert metrics["bits_per_byte"].mean() < by_frequency - 0.8
