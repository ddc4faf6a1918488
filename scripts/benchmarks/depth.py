"""Seconds to trace and compile a GPT's step as it gets deeper, with and without `scan_layers`.

Each number is a run in a process of its own ; rounds go through all of them
in turn. Given are medians, and the ratio of the deepest to the least deep.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

DEPTHS = (6, 12, 24)
COMMON = ("job=gpt", "model.width=128", "model.heads=4", "job.batch_size=8", "steps=2")


def main() -> int:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="bench depth", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    ways = [(scanned, depth) for scanned in (False, True) for depth in DEPTHS]
    seen: dict[tuple[bool, int], list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(asked.rounds):
        for scanned, depth in ways:
            seen[scanned, depth].append(compiled(scanned=scanned, depth=depth))
    rows = [_row(scanned, depth, seen[scanned, depth]) for scanned, depth in ways]
    print(json.dumps(rows, indent=2) if asked.json else table(rows))
    return 0


def compiled(*, scanned: bool, depth: int) -> dict[str, float]:
    """Seconds of the training step's trace and compile in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*COMMON, f"model.depth={depth}", f"scan_layers={scanned}".lower()]
        settings += ["remat=layers", "checkpoint.enabled=false"]
        argv = [sys.executable, "-m", "runner", *settings, "hydra.run.dir=run"]
        environment = {**os.environ, "PJRT_DEVICE": "CPU"}
        subprocess.run(argv, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
        result = json.loads(pathlib.Path(folder, "run", "result.json").read_text())
    (step,) = (one for one in result["compile"]["graphs"] if one["role"] == "step")
    return {"trace_s": step["trace_s"], "xla_s": step["xla_s"], "nodes": step["nodes"]}


def _row(scanned: bool, depth: int, runs: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    whole = statistics.median(run["trace_s"] + run["xla_s"] for run in runs)
    return {"scan_layers": scanned, "depth": depth, "total_s": whole, **medians}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, and how much longer the deepest takes than the least deep."""
    lines = [
        f"{'scan_layers':12} {'layers':>6} {'trace s':>8} {'XLA s':>8} {'both':>8} {'nodes':>7}"
    ]
    for row in rows:
        place = f"{row['scan_layers']!s:12} {row['depth']:6}"
        seconds = f"{row['trace_s']:8.2f} {row['xla_s']:8.2f} {row['total_s']:8.2f}"
        lines.append(f"{place} {seconds} {row['nodes']:7.0f}")
    for scanned in (False, True):
        own = [row["total_s"] for row in rows if row["scan_layers"] == scanned]
        lines.append(
            f"scan_layers={scanned}: {DEPTHS[-1]} layers take {own[-1] / own[0]:.2f} times"
            f" as long as {DEPTHS[0]}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
