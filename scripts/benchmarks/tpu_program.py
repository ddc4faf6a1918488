"""How good a TPU program the step becomes: passes off, passes on, and a twin written in JAX.

Each row is one training step in bf16, compiled by libtpu's own compiler for one chip, on a machine
without a TPU. "cycles" is the sum of the compiler's estimates over the step's operations, loop
bodies times their trips: it compares programs of one compiler, it predicts no time. Operations
without an estimate (asynchronous copies, select-and-scatter) are in the JSON. "HBM" are bytes read
and written by the optimized program's operations, "memory" what the step needs at once, "FLOPs"
those of matrix products and convolutions before optimization, "trace" and "compile" seconds.
Equal parameters and FLOPs of model and twin are checked; models of torchvision and transformers
have no twin. A row that the file already holds is not
compiled again, so that a long run can be made in pieces; `--layers` looks at a shorter model.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from contest.choices import some

from runner.preflight.tpu_compiler import versions
from runner.record.files import write_atomic

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
CHIPS = ("v5e", "v6e")
VARIANTS = ("off", "on", "jax")
#: Layers of the models that have a twin.
TWINS = {"gpt2_small_8": 12, "gpt2_small_16": 12, "resnet50": 6, "vit_b16": 12, "llama_1b": 16}
#: Layers (of each stage) of other libraries' models, which have none.
OUTSIDE = {
    "torchvision_convnext": 2,
    "torchvision_densenet": 4,
    "torchvision_swin": 2,
    "transformers_gpt2": 2,
    "transformers_llama": 2,
    "transformers_vit": 2,
}
LAYERS = {**TWINS, **OUTSIDE}
#: Relative difference of FLOPs up to which model and twin compute the same.
FLOPS_ALIKE = 0.01

Row = dict[str, Any]
Rows = dict[str, Row]


def main() -> int:
    """Compile what is missing, print the table; 1 if a row failed or twins are unlike."""
    arguments = _arguments()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    rows = _known(arguments.json)
    for name in _wanted(arguments):
        if name not in rows or arguments.again:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows[name] = _compiled(name)
            write_atomic(arguments.json, _as_json(rows))
    wanted = list(_wanted(arguments))
    chosen = {name: rows[name] for name in wanted}
    print(_table(chosen))
    unlike = list(_unlike(chosen))
    print(*unlike, sep="\n", end="\n" if unlike else "")
    return 1 if unlike or any("error" in row for row in chosen.values()) else 0


def _known(path: pathlib.Path) -> Rows:
    """Rows of an earlier run with the same compiler."""
    if not path.exists():
        return {}
    held = json.loads(path.read_text(encoding="utf-8"))
    return held["rows"] if held["versions"] == versions() else {}


def _as_json(rows: Rows) -> str:
    found = {"schema": 1, "method": __doc__, "versions": versions(), "rows": rows}
    return json.dumps(found, indent=2) + "\n"


def _wanted(arguments: argparse.Namespace) -> Iterator[str]:
    for model in arguments.models:
        layers = arguments.layers or LAYERS[model]
        for chip in arguments.chips:
            twin = model in TWINS
            for variant in (v for v in arguments.variants if twin or v != "jax"):
                yield f"{model}/{layers}/{chip}/{variant}"


def _compiled(name: str) -> Row:
    """A row, from a process of its own: neither tracing nor compiling finds anything cached."""
    model, layers, chip, variant = name.split("/")
    done = subprocess.run(
        [sys.executable, "-m", "tpu.row", model, chip, variant, layers],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": f"{HERE}:{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": f"the row's process ended with {done.returncode}"}
    row: Row = {**json.loads(done.stdout), "commit": _commit()}
    return row


def _commit() -> str:
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip()


def _table(rows: Rows) -> str:
    header = ["step", "chip", "", "cycles", "/ JAX", "HBM GB", "memory GB", "/ JAX", "FLOPs"]
    header += ["trace s", "compile s"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, row in rows.items():
        model, layers, chip, variant = name.split("/")
        cells = [f"{model}, {layers} layers", chip, variant]
        if "error" in row:
            lines.append("| " + " | ".join([*cells, row["error"]]) + " |")
            continue
        twin = rows.get(f"{model}/{layers}/{chip}/jax", {})
        cells += [f"{row['cycles'] / 1e6:.1f} M", _ratio(row, twin, "cycles")]
        cells += [f"{row['hbm_bytes'] / 1e9:.1f}", f"{row['memory_bytes'] / 1e9:.2f}"]
        cells += [_ratio(row, twin, "memory_bytes"), f"{row['flops'] / 1e12:.2f} T"]
        cells += [f"{row['trace_s']:.1f}", f"{row['compile_s']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(row: Row, twin: Row, key: str) -> str:
    return f"{row[key] / twin[key]:.3f}" if key in twin else "-"


def _unlike(rows: Rows) -> Iterator[str]:
    """What says that a model and its twin are not the same."""
    for name, row in rows.items():
        twin = rows.get(f"{name.rpartition('/')[0]}/jax", {})
        if "flops" not in row or "flops" not in twin:
            continue
        if row["parameters"] != twin["parameters"]:
            yield f"{name}: {row['parameters']} parameters, its twin has {twin['parameters']}"
        if abs(row["flops"] / twin["flops"] - 1) > FLOPS_ALIKE:
            yield f"{name}: {row['flops']:.4g} FLOPs, its twin has {twin['flops']:.4g}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench tpu_program",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, choices in (("models", tuple(LAYERS)), ("chips", CHIPS), ("variants", VARIANTS)):
        parser.add_argument(
            f"--{option}", type=some(choices), default=list(choices), help=", ".join(choices)
        )
    parser.add_argument("--layers", type=int, help="layers (ResNet: blocks a stage at most)")
    parser.add_argument("--again", action="store_true", help="compile rows that are known, too")
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        metavar="FILE",
        default=ROOT / ".cache" / "bench" / "tpu_program.json",
        help="where rows are kept (%(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
