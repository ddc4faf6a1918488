"""ResNet, ViT and MLP as jobs: shapes, metrics, parameter groups, settings; the MLP learns."""

from __future__ import annotations

import itertools
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from jobs.base import DataRequest, Job, SettingError
from jobs.images import digits
from jobs.mlp import MLP
from jobs.resnet import ResNet
from jobs.vit import ViT

FACTS = {"classes": 10, "channels": 1, "image_size": 24}
RESNET = {"depth": 18, "stem": "small", "zero_init_residual": True, "label_smoothing": 0.0}
VIT = {
    "patch": 8,
    "depth": 2,
    "width": 32,
    "heads": 2,
    "dropout": 0.1,
    "label_smoothing": 0.0,
    "position_std": 1.0,
}
MLP_SETTINGS = {"width": 32, "depth": 2, "dropout": 0.1}


def batch_of(count: int, *, channels: int = 1, size: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(count, channels, size, size, generator=generator),
        "label": torch.randint(10, (count,), generator=generator),
    }


def resnet(**settings: Any) -> ResNet:
    return ResNet({**RESNET, **settings}, FACTS)


def vit(**settings: Any) -> ViT:
    return ViT({**VIT, **settings}, FACTS)


def mlp(**settings: Any) -> MLP:
    return MLP({**MLP_SETTINGS, **settings}, FACTS)


JOBS: dict[str, Job] = {"resnet": resnet(), "vit": vit(), "mlp": mlp()}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_loss_is_a_scalar_that_reaches_every_parameter(job: Job) -> None:
    torch.manual_seed(0)
    model = job.build()
    loss = job.loss(model, batch_of(4))
    loss.backward()
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_evaluation_gives_one_float32_an_example(job: Job) -> None:
    torch.manual_seed(0)
    model = job.build().eval()
    batch = batch_of(5)
    with torch.no_grad():
        metrics = job.evaluate(model, batch)
        logits = model(batch["image"])
    assert torch.equal(metrics.pop("predicted"), logits.argmax(1))
    assert {name: (m.shape, m.dtype) for name, m in metrics.items()} == {
        "accuracy": ((5,), torch.float32),
        "loss": ((5,), torch.float32),
    }
    assert metrics["accuracy"].tolist() == (logits.argmax(1) == batch["label"]).float().tolist()
    torch.testing.assert_close(metrics["loss"].mean(), job.loss(model, batch).detach())


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_the_seed_fixes_the_weights(job: Job) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(job.build().parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_every_depth_and_stem_takes_the_data_that_it_is_told_of(depth: int, stem: str) -> None:
    facts = {"classes": 7, "channels": 3, "image_size": 32}
    with torch.device("meta"):
        job = ResNet({**RESNET, "depth": depth, "stem": stem}, facts)
        model = job.build().eval()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)


def test_the_small_stem_keeps_the_resolution() -> None:
    with torch.device("meta"):
        for stem, side in (("small", 24), ("imagenet", 6)):
            model = resnet(stem=stem).build()
            assert isinstance(model.conv1, nn.Module)
            assert isinstance(model.maxpool, nn.Module)
            assert model.maxpool(model.conv1(torch.empty(1, 1, 24, 24))).shape == (
                1,
                64,
                side,
                side,
            )


@pytest.mark.parametrize("zero", [True, False])
def test_zero_init_residual_starts_each_block_as_the_identity(zero: bool) -> None:
    model = resnet(zero_init_residual=zero).build()
    scales = [p for name, p in model.named_parameters() if name.endswith("bn2.weight")]
    assert len(scales) == 8
    assert all(bool((scale == 0).all()) is zero for scale in scales)


def test_label_smoothing_raises_the_loss_of_a_sure_and_right_answer() -> None:
    class Sure(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return nn.functional.one_hot(batch["label"], 10) * 20.0

    batch = batch_of(4)
    plain, smooth = (resnet(label_smoothing=s).loss(Sure(), batch).item() for s in (0.0, 0.1))
    assert plain < 1e-6
    assert smooth > 1


def test_norms_and_biases_have_no_weight_decay() -> None:
    job = resnet()
    model = job.build()
    decayed, free = job.parameter_groups(model)
    assert "weight_decay" not in decayed
    assert free["weight_decay"] == 0.0
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(free["params"]) == 2 * len(norms) + 1
    together = {id(p) for p in itertools.chain(decayed["params"], free["params"])}
    assert together == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (resnet, "depth", 19),
        (resnet, "stem", "tiny"),
        (resnet, "label_smoothing", 1.0),
        (resnet, "zero_init_residual", "maybe"),
        (vit, "patch", 5),
        (vit, "heads", 3),
        (vit, "depth", 0),
        (vit, "position_std", 0),
        (vit, "dropout", -0.1),
        (mlp, "width", 0),
        (mlp, "depth", -1),
        (mlp, "dropout", 1),
        (mlp, "dropout", "a lot"),
    ],
)
def test_a_setting_that_breaks_a_rule_is_named(make: Any, key: str, value: object) -> None:
    with pytest.raises(SettingError, match=rf"model\.{key} must be .*got {value!r}"):
        make(**{key: value})


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model, image = mlp(dropout=0.5).build(), batch_of(2)["image"]
    with torch.no_grad():
        assert not torch.equal(model(image), model(image))
        model.eval()
        assert torch.equal(model(image), model(image))


def test_a_vit_stack_keeps_the_names_and_results_of_torchvision() -> None:
    torch.manual_seed(0)
    job = vit(dropout=0.0)
    model = job.build().eval()
    plain = VisionTransformer(
        image_size=24,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=128,
        num_classes=10,
    ).eval()
    plain.conv_proj = nn.Conv2d(1, 32, 8, stride=8)
    plain.load_state_dict(model.state_dict())
    nn.init.normal_(plain.heads.head.weight)
    model.load_state_dict(plain.state_dict())
    image = batch_of(3)["image"]
    with torch.no_grad():
        assert torch.equal(model(image), plain(image))


def test_vit_sharding_rules_name_each_dimension_of_every_matrix() -> None:
    job = vit()
    for name, parameter in job.build().named_parameters():
        axes = [rule for pattern, rule in job.sharding.items() if re.search(pattern, name)]
        assert len(axes) <= 1, name
        assert axes or parameter.ndim != 2, name
        assert all(len(rule) == parameter.ndim for rule in axes), name


@pytest.mark.parametrize(
    ("make", "steps", "mark"),
    [(partial(MLP, {**MLP_SETTINGS, "width": 128}), 120, 0.85), (partial(ViT, VIT), 200, 0.6)],
    ids=["mlp", "vit"],
)
def test_it_learns_the_digits(make: Any, steps: int, mark: float) -> None:
    data = digits(DataRequest(None, {"image_size": 24, "channels": 1}, workers=1, seed=0))
    assert data.heldout is not None
    torch.manual_seed(0)
    job = make(data.facts)
    model = job.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        arrays = data.train.batch(rng.integers(4000, size=64), rng=rng)
        loss = job.loss(model, {name: torch.from_numpy(a) for name, a in arrays.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    arrays = data.heldout.batch(np.arange(1000), rng=None)
    with torch.no_grad():
        metrics = job.evaluate(
            model.eval(), {name: torch.from_numpy(a) for name, a in arrays.items()}
        )
    assert metrics["accuracy"].mean() > mark
