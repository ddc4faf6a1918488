"""A preflight from a configuration to its verdict: trace, ask the cache, else the compiler."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from runner.backends.base import Recipe
from runner.backends.step.origins import origin_of
from runner.config.chips import SLICES
from runner.config.schema import Config
from runner.preflight import verdict
from runner.preflight.cache import Question, VerdictCache, cache_folder
from runner.preflight.hlo import Module
from runner.preflight.layout import Layout, layout
from runner.preflight.tpu_compiler import (
    CompilerError,
    Port,
    Source,
    TooLargeError,
    TpuCompiler,
    hlo_text,
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
    """A job without data: its step, the shapes of its batch, tokens in an example."""

    recipe: Recipe
    batch: Mapping[str, Tensor]
    tokens: int


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
            multiple = report.chips * config.accumulate_steps
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
        described = self.describe(config)
        target = SLICES[config.hardware.name]
        shape = (1,) * len(target.shape) if config.hardware.devices == 1 else target.shape
        chips = math.prod(shape)
        try:
            step = trace(described.recipe, described.batch, pack=chips == 1)
        except LoweringError as error:
            raise BackendError(_not_lowered(error)) from error
        placed = layout(chips, step.arguments, step.results)
        subject = Subject(
            step=step,
            hardware=target.name,
            chip=target.chip,
            chips=chips,
            topology=topology_of(target.chip, shape),
            mesh=placed.mesh,
            shares=placed.shares,
            batch_size=config.job.batch_size,
            tokens=config.job.batch_size * described.tokens,
            versions=versions(),
        )
        source = _source(subject, placed)
        cache, question = VerdictCache(cache_folder()), _question(subject, source)
        known = cache.find(question) if config.preflight.cache else None
        if known is not None:
            return known
        self.send(Phase("compiling", f"for {target.name}"))
        report = self._compiled(subject, source, dump=config.preflight.dump)
        cache.keep(question, report)
        return report

    def _compiled(self, subject: Subject, source: Source, *, dump: bool) -> PreflightReport:
        flops = verdict.model_flops(subject, Module(hlo_text(source.hlo)))
        compiler = TpuCompiler(subject.topology)
        assert compiler.devices == subject.chips, (compiler.devices, subject.topology)
        program = stablehlo(source)
        if dump:
            write_atomic(self.folder / "step.stablehlo.mlir", program)
        try:
            compiled = compiler.compile(program)
        except CompilerError as error:
            if dump:
                write_atomic(self.folder / "compiler_report.txt", error.report)
            if isinstance(error, TooLargeError):
                return verdict.refused(subject, error, flops=flops)
            raise BackendError(_refused(error)) from error
        if dump:
            write_atomic(self.folder / "step.optimized.hlo", compiled.hlo)
            write_atomic(self.folder / "memory_report.txt", compiled.buffers)
        return verdict.accepted(subject, compiled, flops=flops)


def _source(subject: Subject, placed: Layout) -> Source:
    step = subject.step
    return Source(
        hlo=step.hlo,
        arguments=[
            Port(argument.name, sharding, argument.donated)
            for argument, sharding in zip(step.arguments, placed.arguments, strict=True)
        ],
        results=[
            Port(name, sharding)
            for name, sharding in zip(step.results, placed.results, strict=True)
        ],
        labels=subject.label,
    )


def _question(subject: Subject, source: Source) -> Question:
    return Question(
        hlo=source.hlo,
        names=repr(subject.step.operations),
        ports=(*source.arguments, *source.results),
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
