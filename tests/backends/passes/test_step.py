"""A whole step with its passes: numbers, records, switches."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from torch import nn

from runner.backends.passes.pipeline import GRAPH_PASSES, REWRITES
from runner.config.schema import PassesConfig
from runner.preflight.trace import trace
from runner.record.errors import DeviceError
from tests.backends.passes.models import (
    Convolutional,
    Residual,
    Transformer,
    Update,
    largest,
    problem,
    recipe_of,
    reference,
    update,
    updates,
)

OFF = PassesConfig.off()
#: Those that round no number more than torch does without them.
GENTLE = dataclasses.replace(OFF, attention=True, casts=True, cross_entropy=True, sums=True)
MODELS = [Transformer, Convolutional]
BF16 = torch.bfloat16


def _error(found: Update, make: type[nn.Module], seed: int = 3) -> float:
    """Distance of all gradients from float64, relative."""
    _, expected = reference(make, seed)
    distance = sum((found.gradients[n] - g).square().sum().item() for n, g in expected.items())
    return math.sqrt(distance / sum(g.square().sum().item() for g in expected.values()))


@pytest.mark.parametrize("make", MODELS)
def test_float32_is_as_near_to_float64_with_passes(make: type[nn.Module]) -> None:
    found = update(make, PassesConfig(embeddings=True, parameters=True), None)
    assert found.loss == pytest.approx(reference(make)[0], rel=1e-6)
    assert _error(found, make) < 1e-6
    rounding = {"norms", "embeddings", "parameters", "sums", "roundings"}
    assert not rounding & set(found.graph.passes)


@pytest.mark.parametrize("make", MODELS)
def test_bf16_errs_no_more_with_passes_that_round_no_more(make: type[nn.Module]) -> None:
    without = update(make, OFF, BF16)
    found = update(make, GENTLE, BF16)
    assert without.graph.passes == {}
    assert found.graph.passes["sums"] > 0
    assert _error(found, make) <= _error(without, make)


@pytest.mark.parametrize("make", [Transformer, Residual])
def test_bf16_errs_no_more_with_passes(make: type[nn.Module]) -> None:
    """Over several problems, since in one of them a rounding can turn a ReLU's gradient around."""
    found, without = (updates(make, passes, BF16, range(10)) for passes in (PassesConfig(), OFF))
    ratios = [
        _error(found[seed], make, seed) / _error(without[seed], make, seed) for seed in range(10)
    ]
    assert statistics.geometric_mean(ratios) <= 1


def test_a_residual_stream_s_gradient_is_kept_rounded_and_nothing_else_changes() -> None:
    found, without = (
        update(Transformer, PassesConfig(operands=operands), BF16) for operands in (True, False)
    )
    assert found.graph.passes["operands"] >= 1
    assert "operands" not in without.graph.passes
    assert found.loss == without.loss
    for name, gradient in without.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=0)


def test_an_evaluation_has_its_passes_too() -> None:
    model, batch = problem(Transformer)
    with torch.no_grad():
        expected = model.eval()(batch["input"]).flatten(1).amax(1).sum().item()
    found, graph = largest(Transformer, PassesConfig())
    assert found == pytest.approx(expected, rel=2e-2)
    assert graph.passes == {"attention": 1, "indices": 1, "roundings": 1}


def test_every_pass_has_a_switch() -> None:
    switches = {field.name for field in dataclasses.fields(PassesConfig)}
    assert switches == {*REWRITES, *GRAPH_PASSES}


@pytest.mark.parametrize(("autocast", "count"), [(BF16, 1), (None, 0)])
def test_a_step_for_a_tpu_alone_reads_images_in_float32(
    autocast: torch.dtype | None, count: int
) -> None:
    model, batch = problem(Convolutional)
    step = trace(recipe_of(model, PassesConfig(), autocast), batch)
    assert step.passes.get("inputs", 0) == count
    assert "inputs" not in update(Convolutional, PassesConfig(), autocast).graph.passes


def test_flash_attention_is_refused_where_no_chip_is() -> None:
    with pytest.raises(DeviceError, match="flash_attention must be false on the CPU"):
        update(Transformer, PassesConfig(flash_attention=True), None)
