"""The compiler itself: its versions, what is used of JAX, and its three kinds of answer.

If these fail after a version moved, the first two tests say what is gone; the others, what
means something else.
"""

from __future__ import annotations

import importlib

import pytest
from torch import nn

from runner.config.chips import CHIPS, SLICES
from runner.preflight.buffers import overflow
from runner.preflight.hlo import Module
from runner.preflight.tpu_compiler import (
    PINNED,
    USED,
    CompilerError,
    TooLargeError,
    Topology,
    TpuCompiler,
    installed,
    topology_of,
)
from runner.preflight.verdict import blamed
from runner.record.errors import ConfigError
from tests.preflight.problems import program, traced

ONE_CHIP = topology_of(CHIPS["v5e"], (1, 1))


@pytest.mark.parametrize("package", PINNED)
def test_the_installed_version_is_the_one_that_torch_xla_pins(package: str) -> None:
    assert installed(package) == PINNED[package]


@pytest.mark.parametrize("name", [f"{m}:{name}" for m, names in USED.items() for name in names])
def test_what_is_used_of_jax_is_there(name: str) -> None:
    module, _, attribute = name.partition(":")
    assert hasattr(importlib.import_module(module), attribute)


def test_a_program_that_fits_comes_back_with_memory_cycles_and_buffers() -> None:
    step = traced(
        lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)), 64, 256
    )
    compiled = TpuCompiler(ONE_CHIP).compile(program(step))
    memory = compiled.memory
    assert memory.arguments >= sum(argument.bytes for argument in step.arguments)
    assert memory.aliased >= sum(a.bytes for a in step.arguments if a.donated)
    assert 0 < memory.total < 16 << 20
    assert compiled.seconds > 0
    assert compiled.flops > 0
    parsed = Module(compiled.hlo)
    assert sum(one.cycles or 0 for one in parsed.entry.instructions) > 0
    assert compiled.buffers.startswith("BufferAssignment:")


def too_large(arrays: int) -> str:
    """A program that adds up arrays of 16 GiB each."""
    kind = "tensor<65536x65536xf32>"
    arguments = ", ".join(f"%a{number}: {kind}" for number in range(arrays))
    body = "\n".join(
        f"%s{number} = stablehlo.add %{'s' if number > 1 else 'a'}{number - 1}, %a{number} : {kind}"
        for number in range(1, arrays)
    )
    return f"""
    module @large {{
      func.func public @main({arguments}) -> {kind} {{
        {body}
        return %s{arrays - 1} : {kind}
      }}
    }}
    """


@pytest.mark.parametrize("kind", CHIPS)
def test_a_program_that_is_too_large_is_told_with_the_capacity_that_we_know(kind: str) -> None:
    shape = (1, 1, 1) if kind in ("v4", "v5p") else (1, 1)
    compiler = TpuCompiler(topology_of(CHIPS[kind], shape))
    with pytest.raises(TooLargeError) as caught:
        compiler.compile(too_large(8))
    found = overflow(caught.value.report)
    assert found is not None
    assert found.arguments == 8 << 34
    assert found.capacity == pytest.approx(CHIPS[kind].usable_hbm_bytes, rel=1e-3)


def test_a_refusal_names_the_operation_and_its_line() -> None:
    text = """
    module @bad {
      func.func public @main(%a: tensor<4xf32>) -> tensor<4xf32> {
        %0 = stablehlo.add %a, %a : tensor<4xf32> loc("forward/fc/add"("model.py":3:0))
        %1 = stablehlo.custom_call @no_such_kernel(%0) : (tensor<4xf32>) -> tensor<4xf32>
            loc("forward/fc/kernel"("model.py":12:0))
        return %1 : tensor<4xf32>
      }
    }
    """
    with pytest.raises(CompilerError, match="no_such_kernel") as caught:
        TpuCompiler(ONE_CHIP).compile(text)
    instruction = blamed(caught.value)
    assert instruction is not None
    assert (instruction.op_name, instruction.source) == ("forward/fc/kernel", "model.py:12")


@pytest.mark.parametrize("name", SLICES)
def test_libtpu_knows_every_slice_and_has_a_device_for_each_chip(name: str) -> None:
    made = SLICES[name]
    assert TpuCompiler(topology_of(made.chip, made.shape)).devices == made.chips


def test_a_topology_that_libtpu_does_not_know_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="v99"):
        TpuCompiler(Topology("v99:2x2"))
