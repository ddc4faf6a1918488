"""The TPU compiler of libtpu, run on a machine without a TPU.

Beside `runner.xla.pallas` the only file that knows JAX, of which it uses internals: versions are
pinned, and `tests/preflight/test_tpu_compiler.py` says what broke when one moves. It knows nothing
of models, only of HLO, the names and shardings of its arguments, and a topology.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runner.config.chips import Chip
from runner.record.errors import ConfigError

#: What torch_xla 2.9's own extras pin: the compiler that its TPU VM will use.
PINNED = {"jax": "0.7.1", "jaxlib": "0.7.1", "libtpu": "0.0.21"}

#: Must stand before libtpu is loaded: ask no metadata server, take no chip, and let
#: several processes load the library.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}

_MLIR = "jax._src.interpreters.mlir"
_IR = "jaxlib.mlir.ir"
#: Every name of JAX's that is used here, by module; those behind an underscore are internal.
USED = {
    "jax.experimental.topologies": ("get_topology_desc",),
    _MLIR: ("make_ir_context", "module_to_bytecode"),
    _IR: ("ArrayAttr", "BoolAttr", "DictAttr", "Module", "StringAttr"),
    "jaxlib._jax": (
        "CompileOptions",
        "DeviceAssignment",
        "DeviceList",
        "XlaComputation",
        "XlaRuntimeError",
        "mlir",
    ),
}

Labels = Callable[[str], "Label | None"]


@dataclasses.dataclass(frozen=True)
class Label:
    """What an operation is called in the program, and the source line that it is ascribed to."""

    name: str
    file: str = ""
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, as libtpu names it.

    Attributes:
        name: Generation and chips along each axis, such as "v5e:2x4" or "v4:2x2x1".
        options: What libtpu must be told besides, such as {"chip_config_name": "megacore"}.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def topology_of(chip: Chip, shape: tuple[int, ...]) -> Topology:
    """The topology of chips in a shape. Two cores a chip work as one, as on a TPU VM."""
    options: dict[str, Any] = {}
    if chip.cores > 1:
        options["chip_config_name"] = "megacore"
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    return Topology(f"{chip.generation}:{'x'.join(str(side) for side in shape)}", options)


@dataclasses.dataclass(frozen=True)
class Port:
    """An argument or a result of a program.

    Attributes:
        name: What it is called in the program.
        sharding: An `OpSharding` as text, such as "{devices=[8,1]<=[8]}"; "" on one chip.
        donated: Of an argument, whether a result may have its memory.
    """

    name: str
    sharding: str = ""
    donated: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """A program to compile.

    Attributes:
        hlo: A serialized `HloModuleProto`.
        arguments: Its arguments, in order.
        results: Its results, in order.
        labels: What an operation's name in `hlo` stands for, if it stands for something.
    """

    hlo: bytes
    arguments: Sequence[Port]
    results: Sequence[Port]
    labels: Labels


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip, as the compiled program states them."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int
    peak: int

    @property
    def total(self) -> int:
        """What the chip must hold while a step runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that the compiler accepted.

    Attributes:
        seconds: What compiling took.
        memory: Bytes on a chip.
        flops: Of one chip, as the compiler counts them; loop bodies count once.
        bytes_accessed: Of one chip, on-chip memory included; loop bodies count once.
        hlo: The optimized program, scheduled, of one chip.
        buffers: The compiler's buffer assignment.
    """

    seconds: float
    memory: Memory
    flops: float
    bytes_accessed: float
    hlo: str
    buffers: str


class CompilerError(Exception):
    """The compiler refuses the program.

    Args:
        report: The compiler's own words.
        seconds: What it took to say so.
        hlo: The program as it came to the compiler's passes, or "".
    """

    def __init__(self, report: str, *, seconds: float, hlo: str) -> None:
        super().__init__(report)
        self.report = report
        self.seconds = seconds
        self.hlo = hlo


class TooLargeError(CompilerError):
    """The compiler found no way to fit the program into the chip's memory."""


class TpuCompiler:
    """The compiler for one topology.

    Raises:
        ConfigError: What the extra `preflight` installs is missing, or libtpu does not know
            the topology.
    """

    def __init__(self, topology: Topology) -> None:
        os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
        missing = [name for name in PINNED if installed(name) is None]
        if missing:
            raise ConfigError(
                f"mode=preflight needs {', '.join(missing)}: pip install "
                "'tpu-batch-runner[preflight]' (CPython 3.11 or later)"
            )
        try:
            description = _load("jax.experimental.topologies").get_topology_desc(
                topology_name=topology.name, platform="tpu", **topology.options
            )
        except RuntimeError as error:
            raise ConfigError(f"libtpu does not know topology {topology.name}: {error}") from error
        self._devices: list[Any] = description.devices
        self._client = self._devices[0].client

    @property
    def devices(self) -> int:
        """Devices of the topology: chips, where a chip is one device."""
        return len(self._devices)

    @property
    def device_kind(self) -> str:
        """What libtpu calls the chip, such as "TPU v5 lite"."""
        return str(self._devices[0].device_kind)

    def compile(self, program: str) -> Compiled:
        """Compiles StableHLO as `stablehlo` gives it.

        Raises:
            TooLargeError: It does not fit into memory.
            CompilerError: It cannot be compiled.
        """
        with tempfile.TemporaryDirectory(prefix="runner-preflight-") as folder:
            started = time.monotonic()
            executable = self._compile(program, pathlib.Path(folder))
            seconds = time.monotonic() - started
            buffers = _dumped(pathlib.Path(folder), "*after_optimizations-buffer-assignment.txt")
        costs = executable.cost_analysis()
        return Compiled(
            seconds=seconds,
            memory=_memory(executable.get_compiled_memory_stats()),
            flops=float(costs.get("flops", 0.0)),
            bytes_accessed=float(costs.get("bytes accessed", 0.0)),
            hlo=executable.hlo_modules()[0].to_string(),
            buffers=buffers,
        )

    def _compile(self, program: str, folder: pathlib.Path) -> Any:
        jaxlib = _load("jaxlib._jax")
        options = self._options({"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
        started = time.monotonic()
        try:
            return self._client.compile(
                _bytecode(program), jaxlib.DeviceList(tuple(self._devices)), options
            )
        except jaxlib.XlaRuntimeError as error:
            cls = TooLargeError if "RESOURCE_EXHAUSTED" in str(error) else CompilerError
            hlo = _dumped(folder, "*before_optimizations.txt")
            raise cls(str(error), seconds=time.monotonic() - started, hlo=hlo) from error

    def _options(self, flags: Mapping[str, Any]) -> Any:
        jaxlib = _load("jaxlib._jax")
        options = jaxlib.CompileOptions()
        options.num_replicas, options.num_partitions = 1, self.devices
        ids = np.array([[device.id for device in self._devices]])
        options.device_assignment = jaxlib.DeviceAssignment.create(ids)
        options.executable_build_options.use_spmd_partitioning = self.devices > 1
        options.env_option_overrides = list(flags.items())
        return options


def _load(module: str) -> Any:
    """A module of `USED`: JAX is imported when it is needed, which is late, and untyped."""
    return importlib.import_module(module)


def stablehlo(source: Source) -> str:
    """A program as StableHLO text: arguments and operations named, donation and shardings set."""
    jaxlib, mlir, ir = _load("jaxlib._jax"), _load(_MLIR), _load(_IR)
    text = jaxlib.mlir.xla_computation_to_mlir_module(jaxlib.XlaComputation(source.hlo))
    text = _labelled(text, source.labels)
    with mlir.make_ir_context():
        module = ir.Module.parse(_arguments_named(text, source.arguments))
        main = next(f for f in module.body.operations if f.sym_name.value == "main")
        main.attributes["sym_visibility"] = ir.StringAttr.get("public")
        main.arg_attrs = ir.ArrayAttr.get([_attributes(ir, port) for port in source.arguments])
        _set_result_attributes(ir, main, source.results)
        module.operation.walk(lambda operation: _pinned(ir, operation))
        return str(module.operation.get_asm(enable_debug_info=True))


def hlo_text(hlo: bytes) -> str:
    """A serialized `HloModuleProto` as HLO text."""
    return str(_load("jaxlib._jax").XlaComputation(hlo).get_hlo_module().to_string())


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of everything that decides what the compiler makes of a program."""
    return {name: installed(name) or "" for name in PINNED}


def _attributes(ir: Any, port: Port) -> Any:
    attributes = {}
    if port.donated:
        attributes["jax.buffer_donor"] = ir.BoolAttr.get(True)
    if port.sharding:
        attributes["mhlo.sharding"] = ir.StringAttr.get(port.sharding)
    return ir.DictAttr.get(attributes)


def _pinned(ir: Any, operation: Any) -> Any:
    """Turns the text of a call of "Sharding" into what the partitioner reads."""
    attributes = operation.attributes
    if (
        operation.name == "stablehlo.custom_call"
        and attributes["call_target_name"].value == "Sharding"
    ):
        attributes["mhlo.sharding"] = attributes["backend_config"]
        attributes["backend_config"] = ir.StringAttr.get("")
    return ir.WalkResult.ADVANCE


def _set_result_attributes(ir: Any, main: Any, results: Sequence[Port]) -> None:
    count = len(main.type.results)
    assert count == len(results), (count, len(results))
    main.attributes["res_attrs"] = ir.ArrayAttr.get([_attributes(ir, port) for port in results])


_LOCATION = re.compile(r'loc\("([^"]*)"(?:\(#loc\d*\))?\)')
# Of an inner function's arguments; with two locations the compiler loses the function's own.
_FUSED = re.compile(r"loc\(fused\[(#loc\d+), #loc\d+\]\)")
_ARGUMENT = re.compile(r"(%arg(\d+): \S+ )loc\([^()]*(?:\([^()]*\))?\)")


def _labelled(text: str, labels: Labels) -> str:
    """The module with its operations' locations replaced by what they stand for."""

    def replaced(match: re.Match[str]) -> str:
        label = labels(match[1])
        if label is None:
            return match[0]
        if not label.file:
            return f"loc({_quoted(label.name)})"
        return f"loc({_quoted(label.name)}({_quoted(label.file)}:{label.line}:0))"

    return _FUSED.sub(r"loc(\1)", _LOCATION.sub(replaced, text))


def _arguments_named(text: str, arguments: Sequence[Port]) -> str:
    """The module with the locations of the main function's arguments replaced by their names."""
    begin = text.index("func.func @main(")
    end = text.index("\n", begin)

    def named(match: re.Match[str]) -> str:
        return f"{match[1]}loc({_quoted(arguments[int(match[2])].name)})"

    return text[:begin] + _ARGUMENT.sub(named, text[begin:end]) + text[end:]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _bytecode(program: str) -> bytes:
    mlir, ir = _load(_MLIR), _load(_IR)
    with mlir.make_ir_context():
        return bytes(mlir.module_to_bytecode(ir.Module.parse(program)))


def _memory(stats: Any) -> Memory:
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )


def _dumped(folder: pathlib.Path, pattern: str) -> str:
    """The newest file of a kind that the compiler has left, or "" if it left none."""
    found = sorted(folder.glob(pattern))
    return found[-1].read_text(errors="replace") if found else ""
