"""Llama as a job: transformers' own numbers, presets, folders whole and broken, settings."""

from __future__ import annotations

import json
import math
import pathlib
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.base import DataError, DataRequest, SettingError
from jobs.llama import PRESETS, Llama, logits
from jobs.text import prose
from tests.jobs import folders

FACTS = {"vocabulary": 256, "seq_len": 12, "heldout_tokens": 100, "heldout_bytes": 400}
NULLS = dict.fromkeys(("vocabulary", "depth", "width", "heads", "kv_heads", "mlp_width"))
SMALL = {"depth": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48}


def llama(facts: dict[str, int] = FACTS, **settings: Any) -> Llama:
    return Llama({"preset": "tiny", **NULLS, "dropout": 0.0, **settings}, facts)


def batch_of(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(256, (count, 13), generator=generator)
    return {"tokens": text[:, :-1], "target": text[:, 1:]}


def test_loss_is_a_scalar_that_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    job = llama(**SMALL)
    model = job.build()
    loss = job.loss(model, batch_of(3))
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(256), rel=0.05)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_loss_is_that_of_transformers_own_forward() -> None:
    torch.manual_seed(0)
    job = llama(**SMALL)
    model: Any = job.build().eval()
    batch = batch_of(3)
    with torch.no_grad():
        own = model(input_ids=batch["tokens"])
        torch.testing.assert_close(logits(model, batch["tokens"]), own.logits)
        labels = torch.nn.functional.cross_entropy(own.logits.mT, batch["target"])
        torch.testing.assert_close(job.loss(model, batch), labels)


def test_evaluation_gives_bits_for_each_byte_of_each_example() -> None:
    torch.manual_seed(0)
    job = llama(**SMALL)
    model = job.build().eval()
    with torch.no_grad():
        metrics, loss = job.evaluate(model, batch_of(5)), job.loss(model, batch_of(5))
    assert metrics.pop("predicted").shape == (5, 12)
    assert {name: m.shape for name, m in metrics.items()} == {"loss": (5,), "bits_per_byte": (5,)}
    torch.testing.assert_close(metrics["loss"].mean(), loss)
    # The held-out text has four bytes a token.
    torch.testing.assert_close(metrics["bits_per_byte"], metrics["loss"] / math.log(2) / 4)


@pytest.mark.parametrize(("preset", "billions"), [("1b", 1.24), ("8b", 8.03)])
def test_a_preset_has_the_size_in_its_name(preset: str, billions: float) -> None:
    with torch.device("meta"):
        model = llama(preset=preset).build()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.01)


def test_sizes_overrule_the_preset() -> None:
    model: Any = llama(**SMALL, vocabulary=300).build()
    assert len(model.model.layers) == 2
    assert model.model.embed_tokens.weight.shape == (300, 32)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (48, 32)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_sharding_rules_name_each_dimension_of_every_matrix(preset: str) -> None:
    job = llama(preset=preset)
    with torch.device("meta"):
        model = job.build()
    for name, parameter in model.named_parameters():
        axes = [rule for pattern, rule in job.sharding.items() if re.search(pattern, name)]
        assert len(axes) == (1 if parameter.ndim > 1 else 0), name
        assert all(len(rule) == parameter.ndim for rule in axes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("depth", 0),
        ("width", 30),
        ("width", 36),
        ("heads", 3),
        ("kv_heads", 3),
        ("mlp_width", "wide"),
        ("vocabulary", 255),
        ("dropout", 1.0),
        ("preset", "70b"),
        ("preset", 8),
    ],
)
def test_a_setting_that_breaks_a_rule_is_named(key: str, value: object) -> None:
    with pytest.raises(SettingError, match=r"model\.(heads|\w+) must be .*got"):
        llama(**{**SMALL, key: value})


def test_masked_data_is_refused() -> None:
    with pytest.raises(SettingError, match=r"data\.options\.mask_fraction must be 0"):
        llama({**FACTS, "masked": 2})


def test_data_of_another_kind_is_refused() -> None:
    with pytest.raises(SettingError, match="needs the data's 'vocabulary'"):
        llama({"classes": 10})


def test_without_transformers_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SettingError, match=r"pip install 'tpu-batch-runner\[hf\]'"):
        llama().build()


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "a model"
    folders.write_llama(folder)
    return folder


def test_a_folder_gives_sizes_and_weights(folder: pathlib.Path) -> None:
    own = folders.write_llama(folder)
    torch.manual_seed(99)
    model = llama(preset=str(folder), dropout=0.25).build()
    saved, loaded = own.state_dict(), model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    assert attention.attention_dropout == 0.25


def test_weights_saved_in_bf16_are_trained_in_float32(folder: pathlib.Path) -> None:
    folders.write_llama(folder).bfloat16().save_pretrained(folder)
    model = llama(preset=str(folder)).build()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_sizes_beside_a_folder_are_refused(folder: pathlib.Path) -> None:
    with pytest.raises(SettingError, match=r"model\.depth must be null: .* has its own sizes"):
        llama(preset=str(folder), depth=3)


def test_a_folder_whose_vocabulary_is_too_small_is_refused(folder: pathlib.Path) -> None:
    with pytest.raises(SettingError, match=r"model\.vocabulary must be >= 300, the data's"):
        llama({**FACTS, "vocabulary": 300}, preset=str(folder))


def test_longer_examples_than_the_folder_has_positions_are_refused(folder: pathlib.Path) -> None:
    with pytest.raises(SettingError, match=r"data\.options\.seq_len must be <= 64.*got 65"):
        llama({**FACTS, "seq_len": 65}, preset=str(folder))


def test_a_missing_folder_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/config\.json: cannot be read"):
        llama(preset=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "cannot be read as a model's configuration"),
        ("[1]", "model_type must be 'llama'"),
        ('{"model_type": "bert"}', "model_type must be 'llama'; got 'bert'"),
        ('{"model_type": "llama"}', "hidden_size must be a whole number"),
    ],
)
def test_a_broken_configuration_is_a_data_error(
    content: str, reason: str, folder: pathlib.Path
) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(DataError, match=rf"config\.json: {reason}"):
        llama(preset=str(folder))


def test_weights_in_a_format_that_can_run_code_are_refused(folder: pathlib.Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(DataError, match=r"has no \*\.safetensors"):
        llama(preset=str(folder)).build()


def test_broken_weights_are_a_data_error(folder: pathlib.Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="a model: cannot be loaded as LlamaForCausalLM"):
        llama(preset=str(folder)).build()


def test_missing_weights_are_named(folder: pathlib.Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        llama(preset=str(folder)).build()


def test_weights_of_another_size_are_a_data_error(folder: pathlib.Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 56}))
    with pytest.raises(DataError, match="a model: cannot be loaded as LlamaForCausalLM"):
        llama(preset=str(folder)).build()


def test_it_learns_the_prose() -> None:
    options = {"seq_len": 64, "mask_fraction": 0.0}
    data = prose(DataRequest(None, options, workers=1, seed=0))
    torch.manual_seed(0)
    job = llama(dict(data.facts), **{**SMALL, "width": 64})
    model = job.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(150):
        arrays = data.train.batch(rng.integers(len(data.train), size=16), rng=rng)
        loss = job.loss(model, {name: torch.from_numpy(a) for name, a in arrays.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # From an even guess to well below what a byte costs by its frequency alone, 3.2 nats.
    assert losses[0] > 5
    assert np.mean(losses[-5:]) < 2.9
