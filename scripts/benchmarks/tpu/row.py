"""One row of `scripts/bench tpu_program`: a step compiled for a chip by libtpu, and its figures.

Run as a program, in a process of its own, it writes the row's figures to standard output as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from typing import Any

from runner.config.chips import SLICES
from runner.config.schema import PassesConfig
from runner.preflight import costs
from runner.preflight.hlo import Module
from runner.preflight.tpu_compiler import (
    ENVIRONMENT,
    CompilerError,
    Port,
    Source,
    TpuCompiler,
    hlo_text,
    stablehlo,
    topology_of,
)

VARIANTS = ("off", "on", "jax")


@dataclasses.dataclass(frozen=True)
class Step:
    """A step before it is compiled.

    Attributes:
        program: As StableHLO.
        hlo: The same as HLO text.
        parameters: Numbers that training changes.
        seconds: What it took to get there.
        passes: What the passes changed.
    """

    program: str
    hlo: str
    parameters: int
    seconds: float
    passes: dict[str, int]


def torch_step(model: str, layers: int, passes: PassesConfig) -> Step:
    """The PyTorch model's step, as mode=preflight traces it."""
    from runner.preflight.trace import trace
    from tpu.models import MODELS

    if model in MODELS:
        chosen = MODELS[model]
    else:
        from tpu.outside import OUTSIDE

        chosen = OUTSIDE[model]
    recipe = chosen.recipe(layers, passes)
    started = time.monotonic()
    step = trace(recipe, chosen.batch())
    seconds = time.monotonic() - started
    arguments = [Port(argument.name, donated=argument.donated) for argument in step.arguments]
    results = [Port(name) for name in step.results]
    program = stablehlo(Source(step.hlo, arguments, results, labels=lambda _: None))
    trained = {name for name in step.results if name.startswith("params/")}
    frozen = [a.name for a in step.arguments if a.group == "params" and a.name not in trained]
    assert not frozen, frozen
    return Step(program, hlo_text(step.hlo), step.parameters, seconds, step.passes)


def jax_step(model: str, layers: int) -> Step:
    """The JAX twin's step."""
    from tpu.twins import TWINS

    started = time.monotonic()
    lowered = TWINS[model].lowered(layers)
    program = lowered.as_text()
    seconds = time.monotonic() - started
    hlo = lowered.compiler_ir(dialect="hlo").as_serialized_hlo_module_proto()
    return Step(program, hlo_text(hlo), TWINS[model].parameters(layers), seconds, {})


def figures(step: Step, chip: str) -> dict[str, Any]:
    """What the compiler says of a step on one chip."""
    target = SLICES[f"{chip}-1"]
    shape = (1,) * len(target.shape)
    counted = sum(costs.flops(Module(step.hlo), costs.place_of).values())
    row: dict[str, Any] = {
        "parameters": step.parameters,
        "flops": counted,
        "trace_s": step.seconds,
        "passes": step.passes,
    }
    try:
        compiled = TpuCompiler(topology_of(target.chip, shape)).compile(step.program)
    except CompilerError as error:
        return {**row, "error": str(error).splitlines()[0], "compile_s": error.seconds}
    module = Module(compiled.hlo)
    cycles, without = costs.cycles(module)
    return {
        **row,
        "compile_s": compiled.seconds,
        "cycles": sum(cycles.values()),
        "without_estimate": without,
        "hbm_bytes": costs.memory_bytes(module),
        "memory_bytes": compiled.memory.total,
        "peak_bytes": compiled.memory.peak,
    }


def main() -> None:
    """Compile the row that the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("chip")
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("layers", type=int)
    row = parser.parse_args()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the figures
    os.environ.update({**ENVIRONMENT, "PJRT_DEVICE": "CPU"})
    if row.variant == "jax":
        step = jax_step(row.model, row.layers)
    else:
        passes = PassesConfig() if row.variant == "on" else PassesConfig.off()
        step = torch_step(row.model, row.layers, passes)
    json.dump(figures(step, row.chip), out)
    out.close()


if __name__ == "__main__":
    sys.exit(main())
