"""Kernels that JAX brings for TPUs, as operations of an XLA program.

A kernel is written in Pallas, lowered on the host to the form that the TPU compiler takes, and
called by the program as `tpu_custom_call`. Beside `runner.preflight.tpu_compiler` the only file
that knows JAX. Source: `torch_xla.experimental.custom_kernel` (2.9.0), which lowers for the chip
that is there and so needs one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from runner.record.errors import ConfigError
from runner.xla.binding import binding

_MLIR = "jax._src.interpreters.mlir"
_IR = "jaxlib.mlir.ir"
#: Every name of JAX's that is used here, by module; those behind an underscore are internal.
USED = {
    "jax": ("ShapeDtypeStruct", "jit"),
    "jax.export": ("export",),
    _MLIR: ("make_ir_context",),
    _IR: ("Module", "RankedTensorType"),
}

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and type of an array."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What its elements take."""
        return math.prod(self.sizes) * self.dtype.itemsize


def shape_of(tensor: Tensor) -> Shape:
    """A tensor's shape."""
    return Shape(tuple(tensor.shape), tensor.dtype)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel for arrays of certain shapes.

    Attributes:
        config: What JAX configures `tpu_custom_call` with, as JSON.
        operands: What it takes: arrays that the function's arguments were made into.
        results: What it makes.
        flops: What it computes, which compiler and preflight count by.
    """

    config: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    flops: float

    @property
    def payload(self) -> str:
        """The configuration with the kernel's whole work, of which JAX says only some."""
        config = json.loads(self.config)
        own = config["custom_call_config"]
        own["cost_estimate"] = {
            "transcendentals": 0,
            **own.get("cost_estimate", {}),
            "flops": int(self.flops),
            "bytes_accessed": sum(shape.bytes for shape in (*self.operands, *self.results)),
        }
        return json.dumps(config)

    def __call__(self, *operands: Tensor) -> list[Tensor]:
        """The results, on the operands' XLA device."""
        given = tuple(shape_of(operand) for operand in operands)
        assert given == self.operands, (given, self.operands)
        made: list[Tensor] = binding._xla_tpu_custom_call(
            list(operands),
            self.payload,
            [list(result.sizes) for result in self.results],
            [result.dtype for result in self.results],
        )
        return made


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of JAX's over arrays.

    Attributes:
        module: Where it is.
        name: Its name there.
        options: Its arguments that are no arrays, by name.
    """

    module: str
    name: str
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *arrays: Any) -> Any:
        """Its value; None stands for an array that is not given."""
        return getattr(_load(self.module), self.name)(*arrays, **dict(self.options))


@functools.cache
def kernel(function: Function, arguments: tuple[Shape | None, ...], *, flops: float) -> Kernel:
    """The one kernel that a function calls.

    Args:
        function: What to lower.
        arguments: Its arrays; None for one that is not given.
        flops: See `Kernel`.

    Raises:
        ConfigError: JAX is not installed.
    """
    jax, export = _load("jax"), _load("jax.export")
    described = [
        jax.ShapeDtypeStruct(shape.sizes, _NAMES[shape.dtype]) if shape else None
        for shape in arguments
    ]
    with _no_tracebacks(jax.config):
        # Exported, a kernel has a form that libtpus of some months before JAX's day read too.
        exported = export.export(jax.jit(function), platforms=("tpu",))(*described)
    return _found(exported.mlir_module(), flops=flops)


@contextlib.contextmanager
def _no_tracebacks(config: Any) -> Iterator[None]:
    """Keeps the lines of whoever calls out of a kernel, and so out of a program's identity."""
    before = config.jax_traceback_in_locations_limit
    config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        config.update("jax_traceback_in_locations_limit", before)


def _load(module: str) -> Any:
    """JAX is imported when a kernel is asked for; it must not take the chip."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            "kernels of JAX's need it installed: pip install "
            f"'tpu-batch-runner[preflight]' (CPython 3.11 or later); {error}"
        ) from error


def _found(program: str, *, flops: float) -> Kernel:
    """The kernel in a StableHLO module that calls one."""
    mlir, ir = _load(_MLIR), _load(_IR)
    with mlir.make_ir_context():
        parsed = ir.Module.parse(program)
        operations = [
            operation.operation
            for function in parsed.body.operations
            for operation in function.entry_block.operations
        ]
        (call,) = (one for one in operations if one.name == "stablehlo.custom_call")
        operands = _shapes(ir, call.operands)
        results = _shapes(ir, call.results)
        return Kernel(call.attributes["backend_config"].value, operands, results, flops)


def _shapes(ir: Any, values: Sequence[Any]) -> tuple[Shape, ...]:
    kinds = [ir.RankedTensorType(value.type) for value in values]
    return tuple(Shape(tuple(kind.shape), _TYPES[str(kind.element_type)]) for kind in kinds)
