"""Models of billions of parameters, scanned and sharded, by the TPU compiler: time and memory here.

Preflights of a GPT of 1.5 billion parameters on 64 chips and of a Llama of 8 billion on 64 and 256,
each in a process of its own and without the cache of verdicts. Exit code 1 if one does not fit.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

COMMON = ("mode=preflight", "precision=bf16", "remat=layers", "scan_layers=true", "parallel=fsdp")
GPT = (
    "job=gpt",
    "model.depth=48",
    "model.width=1600",
    "model.heads=25",
    "data.options.seq_len=1024",
)
LLAMA = ("job=llama", "model.preset=8b", "data.options.seq_len=8192")
#: Name, slice, examples a step, the job.
ROWS = {
    "gpt-1.5b": ("v5e-64", 64, GPT),
    "llama-8b": ("v6e-64", 64, LLAMA),
    "llama-8b-256": ("v6e-256", 256, LLAMA),
}


def main() -> int:
    """Compile and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="bench large", description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="separated by commas")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    rows = [measured(name) for name in asked.rows.split(",")]
    print(json.dumps(rows, indent=2) if asked.json else table(rows))
    return 0 if all(row["fits"] for row in rows) else 1


def measured(name: str) -> dict[str, Any]:
    """The verdict on one of `ROWS`, and what it took: seconds, and the most memory of a process.

    The figure of memory is of all processes so far, which grows from row to row or stays.
    """
    hardware, examples, job = ROWS[name]
    settings = [*COMMON, *job, f"hardware={hardware}", "preflight.cache=false"]
    settings += [f"job.batch_size={examples}", f"job.eval_batch_size={examples}"]
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "runner", *settings, "hydra.run.dir=run"]
        started = time.monotonic()
        subprocess.run(argv, cwd=folder, stdout=sys.stderr, check=False)
        seconds = time.monotonic() - started
        result = json.loads(pathlib.Path(folder, "run", "result.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    final = result["final"]
    return {
        "name": name,
        "hardware": hardware,
        "fits": final.get("preflight/fits") == 1.0,
        "hbm_bytes": final.get("preflight/hbm_bytes", 0.0),
        "compile_s": final.get("preflight/compile_s", 0.0),
        "seconds": seconds,
        "memory_bytes": peak,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'model':13} {'slice':8} {'verdict':7} {'GiB a chip':>10} {'compile s':>9} {'all s':>6}"
        f" {'GiB here':>8}"
    ]
    for row in rows:
        place = f"{row['name']:13} {row['hardware']:8} {'fits' if row['fits'] else 'NOT':7}"
        figures = f"{row['hbm_bytes'] / 2**30:10.2f} {row['compile_s']:9.1f} {row['seconds']:6.0f}"
        lines.append(f"{place} {figures} {row['memory_bytes'] / 2**30:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
