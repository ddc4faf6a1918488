"""A job's training step on 1, 2, 4 and 8 devices: time, programs, bytes, collectives.

The devices are XLA's CPU devices, all of them on this machine's cores, and the batch is the same
for any number: what the table shows is what spreading costs, not what chips would gain. Each
mesh has a process of its own. "step ms" is a burst's time over its updates, its median over
rounds; batches are on the devices beforehand. "state MB" is what a device holds of parameters,
buffers and optimizer state. Collectives are read from the compiled program of a device: "MB" are
the whole arrays, "sent MB" what a device sends of them by the ring algorithm. The job is job=gpt
unless overrides say otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from contest.choices import positive, some
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from spread.row import Collective, Row

BENCHMARKS = pathlib.Path(__file__).parent
DEVICES = ("1", "2", "4", "8")
WAYS = ("data", "fsdp")
COLUMNS = ("step ms", "programs", "recompiles", "state MB", "collectives", "MB", "sent MB")


def main() -> int:
    """Measure, print the table, write the JSON."""
    asked = _arguments()
    rows = []
    for devices in asked.devices:
        for way in asked.ways if devices != "1" else ["single"]:
            rows.append(_measured(way, int(devices), asked))
            print(f"{way}, {devices}: {rows[-1].error or 'done'}", file=sys.stderr, flush=True)
    _show(rows, title=" ".join(asked.overrides))
    if asked.json:
        found = {
            "schema": 1,
            "method": __doc__,
            "overrides": asked.overrides,
            "cores": os.cpu_count(),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row.error for row in rows) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--devices", type=some(DEVICES), default=list(DEVICES), help=", ".join(DEVICES)
    )
    parser.add_argument("--ways", type=some(WAYS), default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--rounds", type=positive, default=5, help="bursts (5)")
    parser.add_argument("--steps", type=positive, default=5, help="updates a burst (5)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures")
    parser.add_argument("overrides", nargs="*", default=["job=gpt"], help="as for the runner")
    return parser.parse_args()


def _measured(way: str, devices: int, asked: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        here = [f"parallel={way}", "hardware=cpu", f"hardware.devices={devices}"]
        numbers = [str(asked.rounds), str(asked.steps)]
        done = subprocess.run(
            [sys.executable, "-m", "spread.child", folder, *numbers, *asked.overrides, *here],
            env=_environment(folder, devices),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no word"]
            return Row(way, devices, error=said[-1])
        found = json.loads(pathlib.Path(folder, "row.json").read_text(encoding="utf-8"))
    found["collectives"] = [Collective(**one) for one in found["collectives"]]
    return Row(**found)


def _environment(folder: str, devices: int) -> dict[str, str]:
    flags = (os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={folder}", "--xla_dump_hlo_as_text")
    path = (str(BENCHMARKS), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "XLA_FLAGS": " ".join(filter(None, flags)),
    }


def _show(rows: Sequence[Row], *, title: str) -> None:
    table = Table(title=f"A training step over devices: {title}")
    table.add_column("parallel")
    table.add_column("devices", justify="right")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row.error is not None:
            table.add_row(row.parallel, str(row.devices), escape(row.error))
            continue
        table.add_row(row.parallel, str(row.devices), *_cells(row))
    console = Console()
    Console(width=max(console.width, 120)).print(table)


def _cells(row: Row) -> list[str]:
    kinds = row.collectives
    return [
        f"{row.step_ms:.1f}",
        f"{row.programs_per_step:g}",
        str(row.recompiles),
        _mb(row.state_bytes or 0),
        "\n".join(f"{one.count} {one.kind}" for one in kinds) or "none",
        "\n".join(_mb(one.bytes) for one in kinds),
        "\n".join(_mb(one.wire_bytes) for one in kinds),
    ]


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f}"


if __name__ == "__main__":
    sys.exit(main())
