"""`mode=preflight` beside JAX compiling its own ResNet-50: seconds, memory, a second answer.

Each row is the command, from its start to its end, on 50 layers, 224 x 224, 128 examples, bf16, and
then JAX's own network of the same size compiled for the same slice in a process of its own,
whose imports are not counted. "again" is the same command a second time: the cache of verdicts
answers. A row of the small network (18 layers, 32 x 32) has no twin. With `--rounds` the two take
turns, and figures are medians. Exit code 1 if a target is missed. Some six minutes a round with two
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
COMMON = ("mode=preflight", "job=resnet", "data=synthetic", "precision=bf16")
LARGE = (
    "model.depth=50",
    "model.stem=imagenet",
    "data.options.image_size=224",
    "data.options.classes=1000",
    "job.batch_size=128",
    "job.eval_batch_size=128",
)
SMALL = ("data.options.image_size=32",)
#: Name -> the slice, the job, and whether JAX has the same.
ROWS = {
    "resnet18": ("v5e-1", SMALL, False),
    "resnet50": ("v5e-1", LARGE, True),
    "resnet50-data": ("v6e-8", (*LARGE, "parallel=data"), True),
}
#: What a row must keep to, and the unit.
TARGETS = {
    "trace_s": (10.0, "s to trace and lower"),
    "over_jax": (1.2, "times JAX's seconds"),
    "memory_bytes": (6e9, "bytes of memory"),
    "again_s": (5.0, "s from the cache"),
}
SMALL_TARGETS = {**TARGETS, "seconds": (60.0, "s in all")}

Row = dict[str, Any]


def main() -> int:
    """Compile and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="bench verdict", description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=1, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    rows = [measured(name, rounds=asked.rounds) for name in asked.rows.split(",")]
    print(json.dumps(rows, indent=2) if asked.json else table(rows))
    return 1 if any(row["missed"] for row in rows) else 0


def measured(name: str, *, rounds: int) -> Row:
    """One of `ROWS`: our command, the same again, JAX, in turns."""
    hardware, job, has_twin = ROWS[name]
    turns = [_turn(hardware, job, has_twin=has_twin) for _ in range(rounds)]
    row: Row = {"name": name, "hardware": hardware, "cached": all(t["cached"] for t in turns)}
    for key in ("seconds", "trace_s", "compile_s", "memory_bytes", "again_s", "jax_s"):
        values = [turn[key] for turn in turns if turn[key] is not None]
        row[key] = statistics.median(values) if values else None
    row["over_jax"] = row["seconds"] / row["jax_s"] if has_twin else None
    targets = TARGETS if has_twin else SMALL_TARGETS
    row["missed"] = [
        f"{row[key]:.4g} {unit}, at most {most:.4g}"
        for key, (most, unit) in targets.items()
        if row[key] is not None and row[key] > most
    ]
    return row


def _turn(hardware: str, job: tuple[str, ...], *, has_twin: bool) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        first, second = (preflight(pathlib.Path(folder), hardware, job, run) for run in "ab")
    jax_s = sum(jax_seconds(hardware).values()) if has_twin else None
    return first | {"again_s": second["seconds"], "cached": second["cached"], "jax_s": jax_s}


def preflight(folder: pathlib.Path, hardware: str, job: tuple[str, ...], run: str) -> Row:
    """The command in a folder with a cache of its own, and what it took.

    The figure of memory is the most of any process so far, JAX's included.
    """
    argv = [sys.executable, "-m", "runner", *COMMON, *job, f"hardware={hardware}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    subprocess.run(
        [*argv, f"hydra.run.dir={run}"], cwd=folder, env=environment, stdout=sys.stderr, check=True
    )
    seconds = time.monotonic() - started
    report = json.loads((folder / run / "result.json").read_text())["preflight"]
    spent = report["seconds"]
    return {
        "seconds": seconds,
        "trace_s": spent["trace"] + spent["lower"],
        "compile_s": spent["compile"],
        "memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "cached": report["cached"],
    }


def jax_seconds(hardware: str) -> dict[str, float]:
    """What JAX takes to trace and lower, and to compile, its ResNet-50 for a slice."""
    done = subprocess.run(
        [sys.executable, "-m", "tpu.peer", hardware],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": f"{HERE}:{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


def table(rows: list[Row]) -> str:
    """The rows as text, and what was missed."""
    lines = [
        f"{'network':14} {'slice':6} {'trace s':>8} {'compile s':>10} {'all s':>7} {'JAX s':>7}"
        f" {'ratio':>6} {'GB here':>8} {'again s':>8}"
    ]
    for row in rows:
        jax = (
            f"{row['jax_s']:7.1f} {row['over_jax']:6.2f}" if row["jax_s"] else f"{'-':>7} {'-':>6}"
        )
        lines.append(
            f"{row['name']:14} {row['hardware']:6} {row['trace_s']:8.1f} {row['compile_s']:10.1f}"
            f" {row['seconds']:7.1f} {jax} {row['memory_bytes'] / 1e9:8.2f} {row['again_s']:8.1f}"
        )
    missed = [f"missed: {row['name']}: {told}" for row in rows for told in row["missed"]]
    return "\n".join([*lines, *missed])


if __name__ == "__main__":
    sys.exit(main())
