"""BERT as two jobs: transformers' own numbers, masked tokens, padded texts, folders, settings."""

from __future__ import annotations

import math
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jobs.base import DataError, DataRequest, Job, SettingError
from jobs.bert import BertClassifier, MaskedBert, class_logits, masked_logits
from jobs.text import prose
from tests.jobs import folders

MASKED_FACTS = {"vocabulary": 257, "seq_len": 12, "masked": 3}
CLASS_FACTS = {"vocabulary": 257, "seq_len": 12, "classes": 3}
NULLS = dict.fromkeys(("vocabulary", "depth", "width", "heads", "mlp_width"))
SMALL = {"depth": 2, "width": 32, "heads": 4, "mlp_width": 48}


def masked(facts: dict[str, int] = MASKED_FACTS, **settings: Any) -> MaskedBert:
    return MaskedBert({"preset": "tiny", **NULLS, "dropout": 0.0, **settings}, facts)


def classifier(facts: dict[str, int] = CLASS_FACTS, **settings: Any) -> BertClassifier:
    return BertClassifier({"preset": "tiny", **NULLS, "dropout": 0.0, **settings}, facts)


def built(job: Job) -> Any:
    torch.manual_seed(0)
    return job.build()


def masked_batch(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(256, (count, 12), generator=generator)
    chosen = torch.zeros(count, 12, dtype=torch.bool)
    chosen[:, 2:5] = True
    return {"tokens": whole.masked_fill(chosen, 256), "chosen": chosen, "target": whole}


def class_batch(lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (len(lengths), 12), generator=generator)
    return {
        "tokens": tokens,
        "length": torch.tensor(lengths),
        "label": torch.arange(len(lengths)) % 3,
    }


@pytest.mark.parametrize(
    ("job", "batch", "classes"),
    [(masked(**SMALL), masked_batch(3), 257), (classifier(**SMALL), class_batch([3, 12, 7]), 3)],
    ids=["masked", "classifier"],
)
def test_loss_is_a_scalar_that_reaches_every_parameter(
    job: Job, batch: dict[str, Tensor], classes: int
) -> None:
    model = built(job)
    loss = job.loss(model, batch)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(classes), rel=0.2)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_masked_logits_are_those_of_transformers_own_forward() -> None:
    model, tokens = built(masked(**SMALL)).eval(), masked_batch(3)["tokens"]
    with torch.no_grad():
        torch.testing.assert_close(masked_logits(model, tokens), model(tokens).logits)


def test_class_logits_are_those_of_transformers_own_forward() -> None:
    model, batch = built(classifier(**SMALL)).eval(), class_batch([3, 12, 7])
    attention = (torch.arange(12) < batch["length"][:, None]).long()
    with torch.no_grad():
        own = model(batch["tokens"], attention_mask=attention).logits
        torch.testing.assert_close(class_logits(model, batch), own)


def test_what_stands_behind_a_text_does_not_matter() -> None:
    model, batch = built(classifier(**SMALL)).eval(), class_batch([5, 5])
    changed = batch["tokens"].clone()
    changed[:, 5:] = 0
    with torch.no_grad():
        before, after = (
            class_logits(model, {**batch, "tokens": t}) for t in (batch["tokens"], changed)
        )
    torch.testing.assert_close(before, after)


def test_only_chosen_tokens_count() -> None:
    job, batch = masked(), masked_batch(2)
    batch["target"][:, :] = 7
    told = torch.zeros(2, 12, dtype=torch.long)
    told[0, 2:4] = 7  # of the three chosen tokens two are right
    told[1, 5:] = 7  # right, but not chosen
    scores = nn.functional.one_hot(told, 257) * 50.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.bert.masked_logits", lambda model, tokens: scores)
        metrics = job.evaluate(nn.Identity(), batch)
        loss = job.loss(nn.Identity(), batch)
    torch.testing.assert_close(metrics["accuracy"], torch.tensor([2 / 3, 0.0]))
    torch.testing.assert_close(metrics["loss"], torch.tensor([50 / 3, 50.0]))
    torch.testing.assert_close(loss, metrics["loss"].mean())


def test_classification_gives_one_float_an_example() -> None:
    job, batch = classifier(**SMALL), class_batch([3, 12, 7, 1])
    model = built(job).eval()
    with torch.no_grad():
        metrics, loss = job.evaluate(model, batch), job.loss(model, batch)
    assert metrics.keys() == {"accuracy", "loss", "predicted"}
    assert all(values.shape == (4,) for values in metrics.values())
    torch.testing.assert_close(metrics["loss"].mean(), loss)


def test_sharding_rules_fit_and_every_layer_s_matrices_have_one() -> None:
    for job in (masked(**SMALL), classifier(**SMALL)):
        for name, parameter in built(job).named_parameters():
            axes = [rule for pattern, rule in job.sharding.items() if re.search(pattern, name)]
            assert len(axes) <= 1, name
            assert axes or parameter.ndim < 2 or "encoder.layer" not in name, name
            assert all(len(rule) == parameter.ndim for rule in axes), name


@pytest.mark.parametrize(
    ("key", "value"),
    [("heads", 3), ("depth", 0), ("vocabulary", 256), ("dropout", 1.5), ("preset", "large")],
)
def test_a_setting_that_breaks_a_rule_is_named(key: str, value: object) -> None:
    for make in (masked, classifier):
        with pytest.raises(SettingError, match=rf"model\.{key} must be .*got {value!r}"):
            make(**{**SMALL, key: value})


def test_data_that_masks_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match=r"data\.options\.mask_fraction > 0"):
        masked({**MASKED_FACTS, "masked": 0})


def test_data_of_another_kind_is_refused() -> None:
    with pytest.raises(SettingError, match="needs the data's 'classes'"):
        classifier(MASKED_FACTS).build()


def test_a_pretrained_folder_gives_all_weights_of_the_masked_model(tmp_path: pathlib.Path) -> None:
    own = folders.write_bert(tmp_path / "bert").state_dict()
    loaded = masked(preset=str(tmp_path / "bert")).build().state_dict()
    assert all(torch.equal(own[name], loaded[name]) for name in own)


def test_a_classifier_takes_a_pretrained_body_and_a_new_head(tmp_path: pathlib.Path) -> None:
    own = folders.write_bert(tmp_path / "bert").state_dict()
    torch.manual_seed(0)
    model = classifier(preset=str(tmp_path / "bert")).build()
    loaded = model.state_dict()
    shared = [name for name in own if name.startswith("bert.") and name in loaded]
    assert len(shared) > 30
    assert all(torch.equal(own[name], loaded[name]) for name in shared)
    assert loaded["classifier.weight"].shape == (3, 32)


def test_a_folder_of_another_model_is_refused(tmp_path: pathlib.Path) -> None:
    folders.write_llama(tmp_path / "llama")
    with pytest.raises(DataError, match="model_type must be 'bert'; got 'llama'"):
        masked(preset=str(tmp_path / "llama"))


def test_it_learns_masked_prose() -> None:
    options = {"seq_len": 64, "mask_fraction": 0.15}
    data = prose(DataRequest(None, options, workers=1, seed=0))
    job = masked(dict(data.facts), **{**SMALL, "width": 64})
    model = built(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(80):
        arrays = data.train.batch(rng.integers(len(data.train), size=32), rng=rng)
        loss = job.loss(model, {name: torch.from_numpy(a) for name, a in arrays.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5
    assert np.mean(losses[-5:]) < 3.2
