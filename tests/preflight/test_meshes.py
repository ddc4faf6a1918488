"""The verdict on a mesh: what each chip holds, and what the chips send each other."""

from __future__ import annotations

import pathlib
import re

import pytest

from runner.record.preflight import PreflightReport
from tests.preflight.test_jobs import judged

#: No dimension is padded: sizes are those of the state.
GPT = ["job=gpt", "model.depth=1", "model.width=512", "job.batch_size=16", "precision=bf16"]


def report(folder: pathlib.Path, *overrides: str) -> PreflightReport:
    return judged([*GPT, *overrides], folder)


def sent(report: PreflightReport) -> set[str]:
    return {one.kind for one in report.collectives}


def test_fsdp_holds_a_share_on_each_chip_and_data_all(tmp_path: pathlib.Path) -> None:
    alone = report(tmp_path, "hardware=v5e-4")
    data = report(tmp_path, "hardware=v5e-4", "parallel=data")
    fsdp = report(tmp_path, "hardware=v5e-4", "parallel=fsdp")
    assert (alone.chips, data.chips, fsdp.chips) == (1, 4, 4)
    assert (data.mesh, fsdp.mesh) == ({"data": 4}, {"fsdp": 4})
    assert alone.model_flops == pytest.approx(fsdp.model_flops) == pytest.approx(data.model_flops)
    assert not alone.collectives
    assert sent(data) == {"all-reduce"}
    assert "all-gather" in sent(fsdp)
    state = alone.hbm.arguments
    assert data.hbm.arguments == pytest.approx(state, rel=0.02)
    assert fsdp.hbm.arguments == pytest.approx(state / 4, rel=0.02)
    for one in (alone, data, fsdp):
        assert one.hbm.arguments == pytest.approx(one.arguments_bytes, rel=0.01)
        assert one.hbm.aliased >= 0.98 * one.hbm.outputs


def test_the_jobs_own_rules_cut_matrix_products(tmp_path: pathlib.Path) -> None:
    fsdp = report(tmp_path, "hardware=v6e-8", "parallel=fsdp")
    both = report(tmp_path, "hardware=v6e-8", "parallel=fsdp_tensor", "parallel.tensor=2")
    assert both.mesh == {"fsdp": 4, "tensor": 2}
    assert both.hbm.arguments == pytest.approx(fsdp.hbm.arguments, rel=0.05)
    assert both.model_flops == pytest.approx(fsdp.model_flops)
    assert sum(one.wire_bytes for one in both.collectives) != pytest.approx(
        sum(one.wire_bytes for one in fsdp.collectives)
    )


def test_one_micro_batch_is_in_memory_at_a_time(tmp_path: pathlib.Path) -> None:
    """The compiler would gladly have all of them there at once: nothing else orders them."""
    chip = ["hardware=v5e-1", "job.batch_size=64"]
    once = report(tmp_path, *chip)
    in_four = report(tmp_path, *chip, "accumulate_steps=4")
    assert in_four.hbm.temporaries < 0.5 * once.hbm.temporaries


def test_micro_batches_take_of_every_chips_share(tmp_path: pathlib.Path) -> None:
    """Half of what the chips hold of the activations, and none of it sent around."""
    data = ["hardware=v5e-4", "parallel=data", "job.batch_size=64"]
    once = report(tmp_path, *data)
    twice = report(tmp_path, *data, "accumulate_steps=2")
    assert sent(twice) == {"all-reduce"}
    assert twice.hbm.temporaries < 0.75 * once.hbm.temporaries


def test_batch_norms_are_cut_with_the_batch(tmp_path: pathlib.Path) -> None:
    """No chip gathers what the others hold of the activations."""
    resnet = ["job=resnet", "model.depth=18", "hardware=v4-8", "parallel=data", "precision=bf16"]
    found = judged(resnet, tmp_path)
    assert sent(found) == {"all-reduce"}
    weights = 4 * found.parameters
    assert sum(one.bytes for one in found.collectives) < 1.1 * weights


@pytest.mark.parametrize(
    ("slice", "too_wide", "fitting"),
    [
        (("hardware=v5e-1",), 37888, 36864),
        (("hardware=v5e-4", "parallel=fsdp"), 75776, 73728),
    ],
)
def test_a_job_that_is_a_little_too_large_is_caught_with_the_compilers_numbers(
    tmp_path: pathlib.Path, slice: tuple[str, ...], too_wide: int, fitting: int
) -> None:
    """And its neighbour, some percent smaller, is not."""
    mlp = ["job=mlp", "model.depth=1", "optim=adamw", "job.eval_batch_size=32", *slice]
    large = judged([*mlp, f"model.width={too_wide}", "preflight.dump=true"], tmp_path)
    small = judged([*mlp, f"model.width={fitting}"], tmp_path)
    assert (large.fits, small.fits) == (False, True)
    used = re.search(
        r"Used ([\d.]+)G of 15.75G hbm", (tmp_path / "compiler_report.txt").read_text()
    )
    assert used is not None
    assert large.hbm.total / 2**30 == pytest.approx(float(used[1]), rel=0.01)
    assert large.hbm.capacity == small.hbm.capacity == int(15.75 * 2**30)
    assert 0 < large.hbm.total - large.hbm.capacity < 0.05 * large.hbm.capacity
    assert 0 < small.hbm.capacity - small.hbm.total < 0.05 * small.hbm.capacity
    for one in (large, small):
        assert one.hbm.arguments == pytest.approx(one.arguments_bytes, rel=0.01)
