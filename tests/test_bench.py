"""`scripts/bench step` shows a table, writes every figure as JSON, and outlives a contestant."""

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
    done = subprocess.run(
        [sys.executable, STEP, "--quick", "--models", "mlp", "--json", found, *contestants],
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
