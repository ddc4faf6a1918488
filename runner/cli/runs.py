"""Runs, as Hydra hands them over one by one, and what became of each.

Nothing that goes wrong in a run leaves `Runs.run`, or Hydra would end the batch; only an
interruption does.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from runner.config.compose import Composer
from runner.config.schema import Config
from runner.config.validate import shown_yaml
from runner.record.errors import ExitCode, RunnerError
from runner.record.outcome import Result, State, state_of
from runner.record.preflight import PreflightReport, report_from_json
from runner.record.rundir import RunDir


@dataclasses.dataclass(frozen=True)
class Asked:
    """One run as it was asked for.

    Attributes:
        config: What to do.
        folder: The run folder.
        overrides: The command line's overrides.
        config_yaml: The content of `config.yaml`.
        tensorboard_root: The folder to start TensorBoard on: the run's, or its batch's.
    """

    config: Config
    folder: RunDir
    overrides: list[str]
    config_yaml: str
    tensorboard_root: pathlib.Path


Supervise = Callable[[Asked], Result]


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one run."""

    number: int
    overrides: list[str]
    state: State
    exit_code: int
    reason: str
    final: dict[str, float]
    seconds: float
    preflight: PreflightReport | None = None


class HydraTask(Protocol):
    """What has a task function that Hydra can call."""

    def run(self, cfg: DictConfig) -> None:
        """One run, from its composed configuration."""


class Runs:
    """The task function that Hydra calls, and its results.

    Args:
        composer: What the runs were composed with.
        supervise: Runs one to its end.
    """

    def __init__(self, composer: Composer, *, supervise: Supervise) -> None:
        self.rows: list[Row] = []
        self.batch_folder: pathlib.Path | None = None
        self._composer = composer
        self._supervise = supervise

    @property
    def exit_code(self) -> int:
        """Of the only run, or of the batch: 0 only if every job succeeded."""
        codes = [row.exit_code for row in self.rows]
        if self.batch_folder is None and len(codes) == 1:
            return codes[0]
        return ExitCode.DONE if codes and not any(codes) else ExitCode.JOB_FAILED

    def show(self) -> None:
        """Print the table of a batch."""
        from runner.batch.table import Line, print_table, said  # rich: not for a single run
        from runner.observe.summary import tensorboard_command

        if self.batch_folder is None:
            return
        print_table(
            [
                Line(
                    number=row.number,
                    label=" ".join(row.overrides),
                    state=row.state,
                    result=said(row.state, row.final, row.reason),
                    tries=1,
                    seconds=row.seconds,
                    preflight=row.preflight,
                )
                for row in self.rows
            ]
        )
        print(tensorboard_command(self.batch_folder), flush=True)

    def run(self, cfg: DictConfig) -> None:
        """One run, from its composed configuration to its row.

        Raises:
            KeyboardInterrupt: The user asked for an end; no further run is started.
        """
        hydra = HydraConfig.get()
        if hydra.mode is RunMode.MULTIRUN:
            self.batch_folder = pathlib.Path(hydra.sweep.dir).absolute()
        started = time.monotonic()
        result = self._outcome(cfg)
        code = ExitCode.BUG if result.exit_code is None else result.exit_code
        self.rows.append(
            Row(
                number=len(self.rows),
                overrides=list(hydra.overrides.task),
                state=result.state,
                exit_code=code,
                reason=result.reason,
                final=result.final,
                seconds=time.monotonic() - started,
                preflight=report_from_json(result.preflight) if result.preflight else None,
            )
        )
        if code == ExitCode.INTERRUPTED:
            raise KeyboardInterrupt

    def _outcome(self, cfg: DictConfig) -> Result:
        try:
            return self._supervise(self._asked(cfg))
        except KeyboardInterrupt:
            return _ended(ExitCode.INTERRUPTED, "interrupted")
        except RunnerError as error:
            print(f"runner: {error}", file=sys.stderr)
            return _ended(error.exit_code, str(error))
        except Exception as error:  # a bug of ours must not end the batch
            traceback.print_exc()
            return _ended(ExitCode.BUG, f"{type(error).__name__}: {error}")

    def _asked(self, cfg: DictConfig) -> Asked:
        hydra = HydraConfig.get()
        task = list(hydra.overrides.task)
        folder = pathlib.Path(hydra.runtime.output_dir)
        return Asked(
            config=self._composer.validated(cfg, overrides=[*hydra.overrides.hydra, *task]),
            folder=RunDir(folder),
            overrides=task,
            config_yaml=shown_yaml(cfg),
            tensorboard_root=self.batch_folder or folder,
        )


def _ended(code: ExitCode, reason: str) -> Result:
    return Result(job="", backend="", state=state_of(code), exit_code=code, reason=reason)
