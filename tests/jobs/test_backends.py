"""Every job, tiny, on every backend that trains: the losses are those of plain PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jobs.base import Job
from jobs.bert import BertClassifier, MaskedBert
from jobs.gpt import GPTJob
from jobs.llama import Llama
from jobs.vit import ViT
from runner.backends.base import PREDICTED, Recipe
from runner.config.schema import PassesConfig
from tests.backends import problems

TEXT_FACTS = {"vocabulary": 32, "seq_len": 16, "heldout_tokens": 10, "heldout_bytes": 10}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A job, and a batch of it."""

    job: Callable[[], Job]
    batch: Callable[[int], dict[str, Tensor]]


def text(step: int) -> dict[str, Tensor]:
    stream = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(step))
    return {"tokens": stream[:, :-1].contiguous(), "target": stream[:, 1:].contiguous()}


def gpt() -> Job:
    settings = {"depth": 2, "width": 16, "heads": 2, "dropout": 0.0, "positions": "rotary"}
    return GPTJob(settings, TEXT_FACTS)


def images(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "image": torch.randn(4, 1, 8, 8, generator=generator),
        "label": torch.randint(10, (4,), generator=generator),
    }


def vit() -> Job:
    settings = {"patch": 4, "depth": 2, "width": 16, "heads": 2, "dropout": 0.0}
    facts = {"classes": 10, "channels": 1, "image_size": 8}
    return ViT({**settings, "label_smoothing": 0.1, "position_std": 1.0}, facts)


SIZES = {"preset": "tiny", "vocabulary": None, "depth": 2, "width": 16, "heads": 4}


def llama() -> Job:
    return Llama({**SIZES, "kv_heads": 2, "mlp_width": 32, "dropout": 0.0}, TEXT_FACTS)


def masked(step: int) -> dict[str, Tensor]:
    whole = text(step)["target"]
    chosen = (torch.arange(16) % 4 == step % 4).expand(4, 16).contiguous()
    return {"tokens": whole.masked_fill(chosen, 31), "chosen": chosen, "target": whole}


def masked_bert() -> Job:
    facts = {**TEXT_FACTS, "masked": 4}
    return MaskedBert({**SIZES, "mlp_width": 32, "dropout": 0.0}, facts)


def texts(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "tokens": text(step)["tokens"],
        "length": torch.randint(1, 17, (4,), generator=generator),
        "label": torch.randint(3, (4,), generator=generator),
    }


def bert_classifier() -> Job:
    facts = {"vocabulary": 32, "seq_len": 16, "classes": 3}
    return BertClassifier({**SIZES, "mlp_width": 32, "dropout": 0.0}, facts)


DEFAULT = PassesConfig()
TINY = {
    "llama": Tiny(llama, text),
    "bert": Tiny(masked_bert, masked),
    "bert_classifier": Tiny(bert_classifier, texts),
    "vit": Tiny(vit, images),
    "gpt": Tiny(gpt, text),
}


@functools.cache
def trained(
    name: str,
    backend_name: str,
    *,
    remat: bool = False,
    scan_layers: bool = False,
    autocast: torch.dtype | None = None,
    passes: PassesConfig = DEFAULT,
) -> tuple[list[float], dict[str, float], Tensor]:
    """Losses of two steps, then the held-out metrics of a batch and what is predicted of it."""
    tiny = TINY[name]
    job = tiny.job()
    torch.manual_seed(0)
    recipe = Recipe(
        model=job.build(),
        loss=job.loss,
        evaluate=job.evaluate,
        make_optimizer=lambda model: torch.optim.AdamW(job.parameter_groups(model), lr=1e-3),
        remat=remat,
        scan_layers=scan_layers,
        autocast=autocast,
        passes=passes,
    )
    backend = problems.start(backend_name, recipe)
    losses = [
        backend.train_step(backend.place(tiny.batch(step)), step=step, lr=1e-3)["loss"].item()
        for step in range(2)
    ]
    held = tiny.batch(7)
    mask = torch.ones(len(next(iter(held.values()))))
    placed = backend.place({**held, "mask": mask})
    metrics = backend.eval_step(placed, placed.pop("mask"))
    predicted = metrics.pop(PREDICTED).cpu()
    return losses, {key: value.item() for key, value in metrics.items()}, predicted


@pytest.mark.parametrize("backend", ["lazy", "openxla", "openxla_step"])
@pytest.mark.parametrize("name", TINY)
def test_losses_and_metrics_agree_with_eager(name: str, backend: str) -> None:
    losses, metrics, predicted = trained(name, "eager")
    assert losses[0] != losses[1]
    got = trained(name, backend)
    assert got[0] == pytest.approx(losses, rel=1e-5)
    assert got[1] == pytest.approx(metrics, rel=1e-4)
    assert got[2].shape == predicted.shape
    assert (got[2] == predicted).double().mean() > 0.9  # two that are level may change places


@pytest.mark.parametrize("name", TINY)
def test_losses_are_the_same_with_layers_computed_again(name: str) -> None:
    losses, _, _ = trained(name, "eager")
    assert trained(name, "openxla_step", remat=True)[0] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_losses_and_metrics_are_the_same_with_layers_in_a_loop(name: str) -> None:
    losses, metrics, _ = trained(name, "eager")
    got = trained(name, "openxla_step", remat=True, scan_layers=True)
    assert got[0] == pytest.approx(losses, rel=1e-5)
    assert got[1] == pytest.approx(metrics, rel=1e-4)
    assert trained(name, "openxla_step", remat=True)[1] == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize("backend", ["eager", "lazy", "openxla", "openxla_step"])
@pytest.mark.parametrize("name", TINY)
def test_bf16_is_near_float32_with_no_pass(name: str, backend: str) -> None:
    losses, metrics, _ = trained(name, "eager")
    got = trained(name, backend, autocast=torch.bfloat16, passes=PassesConfig.off())
    assert got[0] != losses
    assert got[0] == pytest.approx(losses, rel=0.01)
    assert got[1] == pytest.approx(metrics, rel=0.05)


@pytest.mark.parametrize("passes", [DEFAULT, PassesConfig.off()], ids=["on", "off"])
@pytest.mark.parametrize("name", TINY)
def test_bf16_is_near_float32_with_layers_in_a_loop(name: str, passes: PassesConfig) -> None:
    losses, metrics, _ = trained(name, "eager")
    got = trained(
        name, "openxla_step", remat=True, scan_layers=True, autocast=torch.bfloat16, passes=passes
    )
    assert got[0] == pytest.approx(losses, rel=0.01)
    assert got[1] == pytest.approx(metrics, rel=0.05)
