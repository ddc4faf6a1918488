"""The TPU compiler on every job that ships, on every mesh, on slices of three generations.

A sweep by `mode=preflight`: whether each step compiles and fits, how long the compiler took, the
memory of a chip. Exit code 1 if one does not. Some ten minutes with two cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
#: `bert_classifier` has no data of its own; its step is that of `bert` with another head.
JOBS = "mlp,resnet,vit,gpt,llama,bert"
MESHES = "single,data,fsdp"
SLICES = "v4-8,v5e-4,v6e-8"
#: What the sweep holds equal; both batch sizes divide by every slice.
COMMON = ("precision=bf16", "job.batch_size=32", "job.eval_batch_size=32", "preflight.cache=false")


def main() -> int:
    """Compile and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="bench preflight", description=__doc__)
    parser.add_argument("--jobs", default=JOBS, help="separated by commas")
    parser.add_argument("--hardware", default=SLICES, help="separated by commas")
    parser.add_argument("--parallel", default=MESHES, help="separated by commas")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    axes = {"job": asked.jobs, "hardware": asked.hardware, "parallel": asked.parallel}
    rows = matrix(axes)
    print(json.dumps(rows, indent=2) if asked.json else table(rows))
    return 0 if all(row["fits"] for row in rows) else 1


def matrix(axes: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for every job, slice and mesh."""
    with tempfile.TemporaryDirectory() as folder:
        batch = pathlib.Path(folder) / "multirun" / "matrix"
        settings = [
            "mode=preflight",
            *(f"{key}={values}" for key, values in axes.items()),
            *COMMON,
            "batch.name=matrix",
        ]
        argv = [sys.executable, "-m", "runner", "-m", *settings]
        done = subprocess.run(argv, cwd=folder, stdout=sys.stderr, check=False)
        if not (batch / "sweep.json").exists():
            raise SystemExit(done.returncode)
        jobs = json.loads((batch / "sweep.json").read_text())["jobs"]
    return [_row(job, axes) for job in jobs]


def _row(job: dict[str, Any], axes: Mapping[str, str]) -> dict[str, Any]:
    # An axis with one value is no part of a job's overrides.
    asked = {**axes, **dict(override.split("=", 1) for override in job["overrides"])}
    final = job["final"]
    return {
        **{axis: asked[axis] for axis in axes},
        "fits": job["state"] == "succeeded" and final.get("preflight/fits") == 1.0,
        "hbm_bytes": final.get("preflight/hbm_bytes", 0.0),
        "compile_s": final.get("preflight/compile_s", 0.0),
        "reason": job["reason"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, a line each, and how many fit."""
    lines = [f"{'job':8} {'hardware':9} {'parallel':9} {'verdict':8} {'MiB':>8} {'compile s':>10}"]
    for row in rows:
        verdict = "fits" if row["fits"] else "NOT"
        place = f"{row['job']:8} {row['hardware']:9} {row['parallel']:9} {verdict:8}"
        figures = f"{row['hbm_bytes'] / 2**20:8.1f} {row['compile_s']:10.1f}"
        lines.append(f"{place} {figures} {row['reason']}".rstrip())
    return "\n".join([*lines, f"{sum(row['fits'] for row in rows)} of {len(rows)} fit"])


if __name__ == "__main__":
    sys.exit(main())
