"""Layers in a loop, as the TPU compiler takes them: as much work, and no more program."""

from __future__ import annotations

import functools
import pathlib
import tempfile

import pytest

from runner.record.preflight import PreflightReport
from tests.preflight.test_jobs import judged

GPT = ["job=gpt", "model.width=256", "model.heads=2", "job.batch_size=16", "precision=bf16"]
DEPTH = 6


@functools.cache
def report(*overrides: str) -> PreflightReport:
    with tempfile.TemporaryDirectory() as folder:
        return judged([*GPT, "remat=layers", *overrides], pathlib.Path(folder))


def one_chip(*, scanned: bool, depth: int = DEPTH) -> PreflightReport:
    return report("hardware=v5e-1", f"model.depth={depth}", f"scan_layers={scanned}".lower())


def test_the_work_of_a_step_is_that_of_the_layers_one_by_one() -> None:
    kept, looped = (one_chip(scanned=scanned) for scanned in (False, True))
    assert looped.model_flops == pytest.approx(kept.model_flops)
    assert looped.flops == pytest.approx(kept.flops, rel=0.02)
    assert looped.arguments_bytes == kept.arguments_bytes
    assert looped.hbm.arguments == pytest.approx(kept.hbm.arguments, rel=0.01)
    assert looped.hbm.aliased >= 0.98 * looped.hbm.outputs


def test_the_compilers_estimate_is_about_that_of_the_layers_one_by_one() -> None:
    kept, looped = (one_chip(scanned=scanned).estimate for scanned in (False, True))
    assert kept is not None
    assert looped is not None
    assert looped.cycles == pytest.approx(kept.cycles, rel=0.25)


def test_the_program_does_not_grow_with_the_layers() -> None:
    few, many = (one_chip(scanned=True, depth=depth) for depth in (DEPTH, 4 * DEPTH))
    # Small tensors are updated side by side; stacks of more layers are no small ones.
    assert many.nodes <= few.nodes + 20
    assert many.hbm.program < 1.2 * few.hbm.program
    # The head's products are no layer's.
    assert 3 * few.model_flops < many.model_flops < 4 * few.model_flops


def test_scanned_layers_are_named_as_one_with_their_lines_and_all_their_cycles() -> None:
    found = one_chip(scanned=True)
    assert any(one.what.startswith("params/layers.*.") for one in found.largest)
    assert found.estimate is not None
    layers = [one for one in found.estimate.modules if one.module.startswith("layers.*")]
    assert sum(one.cycles for one in layers) > 0.75 * found.estimate.cycles
    phases = {one.phase for one in found.estimate.operations if one.module.startswith("layers.*")}
    assert phases == {"forward", "recompute", "backward"}


def test_an_array_in_a_loop_is_known_by_the_line_that_makes_it() -> None:
    small = ["job.batch_size=64", "backend.passes.embeddings=true"]  # else others are larger
    found = report("hardware=v5e-1", f"model.depth={DEPTH}", "scan_layers=true", *small)
    made = [one for one in found.largest if "/layers.*" in one.what and one.kind == "temporary"]
    assert made
    assert all("gpt.py:" in one.source for one in made)


def test_fsdp_gathers_a_layers_parameters_and_no_activations() -> None:
    found = report("hardware=v5e-4", "parallel=fsdp", f"model.depth={DEPTH}", "scan_layers=true")
    alone = one_chip(scanned=True)
    assert found.hbm.arguments == pytest.approx(alone.hbm.arguments / 4, rel=0.05)
    assert {one.kind for one in found.collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = sum(one.bytes for one in found.collectives if one.kind == "all-gather")
    parameters = 4 * found.parameters
    assert 0 < gathered <= 2.2 * parameters
