"""A preflight from a configuration to its verdict: trace, ask the cache, else the compiler."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from runner.backends.base import Recipe
from runner.backends.sharding import Rules, Sharding
from runner.backends.step.origins import origin_of
from runner.config.chips import SLICES
from runner.config.parallel import Mesh, mesh_of
from runner.config.schema import Config
from runner.preflight import verdict
from runner.preflight.cache import Question, VerdictCache, cache_folder
from runner.preflight.layout import shardings
from runner.preflight.recall import Recall, watched
from runner.preflight.tpu_compiler import (
    CompilerError,
    Port,
    Source,
    TooLargeError,
    TpuCompiler,
    stablehlo,
    topology_of,
    versions,
)
from runner.preflight.trace import trace
from runner.preflight.trials import largest_batch, suggestions, with_batch
from runner.preflight.verdict import Subject
from runner.record.errors import BackendError, DeviceError
from runner.record.events import Event, Phase, Preflighted
from runner.record.files import write_atomic
from runner.record.preflight import PreflightReport
from runner.xla.placeholder import LoweringError


@dataclasses.dataclass(frozen=True)
class Described:
    """A job without data.

    Attributes:
        recipe: Its step.
        batch: Tensors of the shapes and types of its batch.
        tokens: In an example.
        rules: How its parameters are cut: see `jobs.base.Job.sharding`.
    """

    recipe: Recipe
    batch: Mapping[str, Tensor]
    tokens: int
    rules: Rules = dataclasses.field(default_factory=dict)


class Describe(Protocol):
    """Makes a description of the job that a configuration names."""

    def __call__(self, config: Config) -> Described: ...


@dataclasses.dataclass(frozen=True)
class Preflight:
    """Judges configurations.

    Attributes:
        describe: What a configuration's job looks like.
        send: Where events go.
        folder: The run folder.
    """

    describe: Describe
    send: Callable[[Event], None]
    folder: pathlib.Path

    def run(self, config: Config) -> None:
        """The verdict on a configuration, sent as an event.

        Raises:
            DeviceError: The program does not fit into the chip's memory.
            BackendError: It cannot be compiled.
        """
        report = self.judge(config)
        if config.preflight.find == "batch_size":
            multiple = _mesh(config).batch_parts * config.accumulate_steps
            report, search = largest_batch(config, report, self.judge, multiple=multiple)
            config = with_batch(config, report.batch_size)
            report = dataclasses.replace(report, search=search)
        if not report.fits:
            judge = self.judge if config.preflight.suggest else None
            report = dataclasses.replace(report, suggestions=suggestions(config, judge))
        self.send(Preflighted(report.to_json()))
        if not report.fits:
            raise DeviceError(report.reason)

    def judge(self, config: Config) -> PreflightReport:
        """The report on one configuration.

        Raises:
            BackendError: The step cannot be traced or compiled.
        """
        self.send(Phase("tracing"))
        target, mesh = SLICES[config.hardware.name], _mesh(config)
        shape = target.shape if mesh.devices > 1 else (1,) * len(target.shape)
        with watched() as read:
            described = self.describe(config)
            sharding = Sharding(mesh, described.rules)
            try:
                step = trace(described.recipe, described.batch, sharding=sharding)
            except LoweringError as error:
                raise BackendError(_not_lowered(error)) from error
        subject = Subject(
            step=step,
            hardware=target.name,
            chip=target.chip,
            chips=mesh.devices,
            topology=topology_of(target.chip, shape),
            mesh=mesh.axes,
            shares=[sharding.parts(argument.partition) for argument in step.arguments],
            batch_size=config.job.batch_size,
            tokens=config.job.batch_size * described.tokens,
            versions=versions(),
        )
        source = _source(subject, mesh)
        cache, question = VerdictCache(cache_folder()), _question(subject, source)
        asked = config.preflight
        known = cache.find(question.key) if asked.cache and not asked.dump else None
        if known is not None:
            Recall(config).keep(question.key, read)
            return known
        self.send(Phase("compiling", f"for {target.name}"))
        report = self._compiled(subject, source, dump=asked.dump)
        cache.keep(question, report)
        Recall(config).keep(question.key, read)
        return report

    def _compiled(self, subject: Subject, source: Source, *, dump: bool) -> PreflightReport:
        compiler = TpuCompiler(subject.topology)
        assert compiler.devices == subject.chips, (compiler.devices, subject.topology)
        program = stablehlo(source)
        if dump:
            write_atomic(self.folder / "step.stablehlo.mlir", program)
        with ThreadPoolExecutor(1) as beside:  # the compiler leaves Python free
            flops = beside.submit(verdict.model_flops, subject, source.hlo)
            try:
                compiled = compiler.compile(program)
            except CompilerError as error:
                if dump:
                    write_atomic(self.folder / "compiler_report.txt", error.report)
                if isinstance(error, TooLargeError):
                    return verdict.refused(subject, error, flops=flops.result())
                raise BackendError(_refused(error)) from error
        if dump:
            write_atomic(self.folder / "step.optimized.hlo", compiled.hlo)
            write_atomic(self.folder / "memory_report.txt", compiled.buffers)
        return verdict.accepted(subject, compiled, flops=flops.result())


def _mesh(config: Config) -> Mesh:
    """The mesh that a run of this configuration would have."""
    devices = config.hardware.devices or SLICES[config.hardware.name].chips
    return mesh_of(config.parallel, devices)


def _source(subject: Subject, mesh: Mesh) -> Source:
    step = subject.step
    arguments, results = shardings(mesh, step.arguments, step.results)
    return Source(
        hlo=step.hlo,
        arguments=[
            Port(argument.name, sharding, argument.donated)
            for argument, sharding in zip(step.arguments, arguments, strict=True)
        ],
        results=[Port(*named) for named in zip(step.results, results, strict=True)],
        labels=subject.label,
    )


def _question(subject: Subject, source: Source) -> Question:
    return Question(
        hlo=source.hlo,
        names=repr(subject.step.operations),
        ports=(*source.arguments, *source.results),
        hardware=subject.hardware,
        topology=subject.topology,
        versions=subject.versions,
    )


def _not_lowered(error: LoweringError) -> str:
    origin = origin_of(error.node)
    line = f" at {origin.file}:{origin.line}" if origin.file else ""
    module = f" in {origin.module}" if origin.module else ""
    return (
        f"the step does not compile: XLA has no {error.node.target}{module}{line} "
        f"({origin.phase} pass): {error.reason}"
    )


def _refused(error: CompilerError) -> str:
    blamed = verdict.blamed(error)
    if blamed is None:
        return f"the step does not compile: {error}"
    line = f" at {blamed.source}" if blamed.source else ""
    return f"the step does not compile: {blamed.op_name or blamed.opcode}{line}: {error}"
