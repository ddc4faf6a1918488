"""The benchmarks show tables, write every figure as JSON, and outlive a part that fails."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from runner.preflight.tpu_compiler import versions

ROOT = pathlib.Path(__file__).parents[1]
STEP = ROOT / "scripts" / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The benchmark's process, ended, and its JSON; on a machine where jax does not import."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "jax.py").write_text("raise ImportError('no jax for this test')\n")
    found = folder / "figures.json"
    path = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    contestants = ["--contestants", "lazy,openxla_step,jax"]
    options = ["--models", "mlp", "--json", found]
    done = subprocess.run(
        [sys.executable, STEP, "--quick", "--firsts", "2", *options, *contestants],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.exists(), done.stderr
    return done, json.loads(found.read_text())


def test_there_is_a_table_and_every_figure_in_json(
    run: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, found = run
    assert "openxla_step" in done.stdout
    assert "lazy / openxla_step" in done.stdout
    lazy, step = found["rows"][:2]
    assert {key for key, value in step.items() if value is None} == {"error"}
    assert {key for key, value in lazy.items() if value is None} == {
        "error",
        *("binding_ms", "program_ms", "host_to_binding", "arguments"),
    }
    assert step["programs_per_step"] == lazy["programs_per_step"] == 1
    assert step["recompiles"] == lazy["recompiles"] == 0
    assert len(step["losses"]) == 10
    assert len(step["first_steps_s"]) == 2
    assert step["first_step_s"] == pytest.approx(sum(step["first_steps_s"]) / 2)
    assert step["losses"] == pytest.approx(lazy["losses"], rel=1e-5)
    judged = {target["what"]: target["met"] for target in found["targets"]}
    assert judged["programs a step"] is True
    assert judged["openxla_step / jax"] is None


def test_a_contestant_that_cannot_run_is_a_row_that_says_why(
    run: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, found = run
    assert done.returncode == 1
    jax = found["rows"][2]
    assert jax["step_median_ms"] is None
    assert "the jax rows need jax and optax" in jax["error"]
    assert "no jax for this test" in jax["error"]


def test_an_unknown_contestant_is_refused_with_the_known_ones() -> None:
    done = subprocess.run(
        [sys.executable, STEP, "--contestants", "lasy"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "must be among eager, lazy" in done.stderr


def _program_row(**changes: Any) -> dict[str, Any]:
    figures = {"cycles": 3e6, "hbm_bytes": 1e9, "memory_bytes": 2e9, "flops": 1e12}
    return {**figures, "parameters": 7, "trace_s": 1.0, "compile_s": 2.0, **changes}


def _program(folder: pathlib.Path, twin: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`scripts/bench tpu_program` with rows that are all known."""
    rows = {"vit_b16/1/v5e/on": _program_row(), "vit_b16/1/v5e/jax": twin}
    known = folder / "rows.json"
    known.write_text(json.dumps({"versions": versions(), "rows": rows}))
    script = ROOT / "scripts" / "benchmarks" / "tpu_program.py"
    options = ["--models", "vit_b16", "--layers", "1", "--chips", "v5e", "--variants", "on,jax"]
    return subprocess.run(
        [sys.executable, script, *options, "--json", known],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_programs_are_compared_with_rows_that_are_known_already(tmp_path: pathlib.Path) -> None:
    done = _program(tmp_path, _program_row(cycles=4e6))
    assert done.returncode == 0, done.stderr
    assert "| vit_b16, 1 layers | v5e | on | 3.0 M | 0.750 |" in done.stdout


def test_a_twin_that_computes_less_is_told(tmp_path: pathlib.Path) -> None:
    done = _program(tmp_path, _program_row(flops=0.9e12))
    assert done.returncode == 1
    assert "vit_b16/1/v5e/on: 1e+12 FLOPs, its twin has 9e+11" in done.stdout


@pytest.fixture(scope="module")
def spread(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """`scripts/bench scaling` of a small GPT, and its rows."""
    found = tmp_path_factory.mktemp("scaling") / "figures.json"
    small = ["job=gpt", "model.depth=1", "model.width=64", "job.batch_size=8"]
    done = _scaling("--devices", "1,2", "--rounds", "1", "--steps", "2", "--json", found, *small)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(found.read_text())["rows"]
    return done, rows


def _scaling(*options: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "benchmarks" / "scaling.py", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_scaling_tells_programs_and_bytes_of_each_mesh(
    spread: tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]],
) -> None:
    done, rows = spread
    assert [(row["parallel"], row["devices"]) for row in rows] == [
        ("single", 1),
        ("data", 2),
        ("fsdp", 2),
    ]
    single, data, fsdp = rows
    assert {row["programs_per_step"] for row in rows} == {1}
    assert {row["recompiles"] for row in rows} == {0}
    assert data["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert fsdp["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert data["state_bytes"] == single["state_bytes"]
    assert 0.5 <= fsdp["state_bytes"] / single["state_bytes"] < 0.55
    assert "all-gather" in done.stdout


def test_scaling_tells_collectives_by_kind(
    spread: tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]],
) -> None:
    """Data parallel devices add up gradients; those of fsdp fetch parameters as well."""
    single, data, fsdp = (
        {one["kind"]: one["bytes"] for one in row["collectives"]} for row in spread[1]
    )
    parameters = 64 * (256 + 12 * 64 + 2 * 3)
    assert single == {}
    assert data.keys() == {"all-reduce"}
    assert data["all-reduce"] >= 4 * parameters * 0.9
    assert fsdp["all-gather"] > 0


def test_scaling_goes_on_after_a_mesh_that_fails() -> None:
    done = _scaling("--devices", "2", "--ways", "data", "job=gpt", "job.batch_size=3")
    assert done.returncode == 1
    assert "job.batch_size must be a multiple of 2" in done.stdout
