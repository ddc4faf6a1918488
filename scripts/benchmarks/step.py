"""Training steps by every backend, by PyTorch's own openxla and by hand-written JAX, compared.

Each contestant trains the same model from the same weights on the same batches in a process of
its own, in turns, one at a time. Batches are on the device beforehand. A turn is a burst of
updates with nothing waited for in between and one wait for the device at its end, JAX's being
`block_until_ready`; "step ms" is a burst's time over its updates, its median and 95th percentile
over bursts. Then single calls are made on an idle device: "host ms" is the time until the call
returns, from batches that lie on the device and a learning rate that no call had before; "after
ms" what the runner's loop leaves to the thread that waits for a step's end (openxla_step frees
there what the call has consumed), "program ms" the binding's own call plus the program (the
device's floor), "host/bind" host ms over the time that `torch_xla._XLAC._run_cached_graph`
takes of it, in the same calls. First steps go from weights on the host to a loss read on the host,
each in a process of its own, in turns; "first s" is their median; imports and opening the device
are not in them. "XLA s" are all compiles of the process. Ratios are ratios of medians. JAX's CPU
client runs a program with donated inputs before its call returns: there its host time contains the
program. All compute loss and gradient norm. A contestant that does not answer within two minutes
is ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from contest.choices import positive, some
from contest.report import notes, show
from contest.roster import CONTESTANTS, MODELS
from contest.rounds import Effort, Row, compare
from contest.targets import Target, targets

from runner.config.hardware import find_hardware
from runner.config.schema import HardwareConfig

PACKAGES = ("torch", "torch_xla", "jax", "jaxlib", "optax")


def main() -> int:
    """Run the comparison, print the table, write the JSON."""
    arguments = _arguments()
    for name, value in find_hardware(HardwareConfig()).environment().items():
        os.environ.setdefault(name, value)
    effort = _effort(arguments)
    rows: list[Row] = []
    for model in arguments.models:
        rows += compare(model, arguments.contestants, effort=effort, say=_say)
    judged = targets(rows)
    show(rows, judged)
    if arguments.json:
        found = _as_json(rows, judged, effort=effort)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row.error for row in rows) else 0


def _effort(arguments: argparse.Namespace) -> Effort:
    quick = arguments.quick
    return Effort(
        firsts=arguments.firsts or (1 if quick else 3),
        rounds=arguments.rounds or (2 if quick else 10),
        steps=arguments.steps or (10 if quick else None),
        probes=2 if quick else 5,
        apart=os.environ["PJRT_DEVICE"] != "CPU",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", type=some(tuple(MODELS)), default=list(MODELS), help=", ".join(MODELS)
    )
    parser.add_argument(
        "--contestants",
        type=some(tuple(CONTESTANTS)),
        default=list(CONTESTANTS),
        help=", ".join(CONTESTANTS),
    )
    parser.add_argument("--steps", type=positive, help="updates a burst (10 or 20, by model)")
    parser.add_argument("--firsts", type=positive, help="first steps of each contestant (3)")
    parser.add_argument("--rounds", type=positive, help="bursts of each contestant (10)")
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds and fewer calls, to see it work"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures")
    return parser.parse_args()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _as_json(rows: Sequence[Row], judged: Sequence[Target], *, effort: Effort) -> dict[str, Any]:
    return {
        "schema": 1,
        "method": __doc__,
        "device": os.environ["PJRT_DEVICE"],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "effort": dataclasses.asdict(effort),
        "rows": [dataclasses.asdict(row) for row in rows],
        "notes": list(notes(rows)),
        "targets": [dataclasses.asdict(target) for target in judged],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
