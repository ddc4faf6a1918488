"""MLflow and Weights & Biases: a run's scalars and settings, for those who compare runs there.

Both write into the run folder and send nothing: `RUN/mlflow` is a file store, `RUN/wandb` holds
offline runs. They know nothing of events. Any exception may come out of either; the observer
lets none of them end the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from runner.config.schema import Config
from runner.observe.hparams import HParam, hparams_of
from runner.observe.metrics import Point
from runner.record.outcome import State
from runner.record.rundir import RunDir

#: Of a chart's x axis in W&B, whose own step counts calls.
_STEP = "updates"


class Sink(Protocol):
    """Takes the points of one run."""

    def scalars(self, point: Point) -> None:
        """Record a point."""

    def close(self, state: State) -> None:
        """Record how the run ended."""


class MlflowSink:
    """Writes to a file store in the run folder: `mlflow ui --backend-store-uri RUN/mlflow`.

    Args:
        run_dir: The run's folder.
        job: The job's name, the experiment's as well.
        hparams: The settings of the run, by dotted key.
    """

    def __init__(self, run_dir: RunDir, *, job: str, hparams: Mapping[str, HParam]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import entities  # seconds of imports that few runs need
        from mlflow.tracking import MlflowClient

        folder = (run_dir.path / "mlflow").absolute()
        self._metric: Callable[..., Any] = entities.Metric
        self._client = MlflowClient(tracking_uri=folder.as_uri())
        known = self._client.get_experiment_by_name(job)
        experiment = known.experiment_id if known else self._client.create_experiment(job)
        run = self._client.create_run(experiment, run_name=run_dir.path.name)
        self._run_id: str = run.info.run_id
        params = [entities.Param(key, str(value)) for key, value in hparams.items()]
        self._client.log_batch(self._run_id, params=params)

    def scalars(self, point: Point) -> None:
        """Record a point under each of its tags."""
        at_ms = int(point.time * 1e3)
        metrics = [
            self._metric(tag, value, at_ms, point.step) for tag, value in point.values.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, state: State) -> None:
        """Record how the run ended."""
        stopped = state in (State.PREEMPTED, State.CANCELLED)
        status = "FINISHED" if state.good else "KILLED" if stopped else "FAILED"
        self._client.set_terminated(self._run_id, status=status)


class WandbSink:
    """Writes an offline run into the run folder: `wandb sync RUN/wandb/offline-run-*` sends it.

    Args: see `MlflowSink`; the job's name is the project's.
    """

    def __init__(self, run_dir: RunDir, *, job: str, hparams: Mapping[str, HParam]) -> None:
        folder = run_dir.path.absolute()
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_CACHE_DIR", os.fspath(folder / "wandb" / "cache"))
        import wandb  # a second of imports that few runs need

        (folder / "wandb").mkdir(exist_ok=True)
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            dir=os.fspath(folder),
            mode="offline",
            project=job,
            name=run_dir.path.name,
            config=dict(hparams),
            reinit="create_new",  # jobs of a sweep are open side by side
            settings=settings,
        )
        self._run.define_metric("*", step_metric=_STEP)

    def scalars(self, point: Point) -> None:
        """Record a point."""
        self._run.log({_STEP: point.step, "_timestamp": point.time or time.time(), **point.values})

    def close(self, state: State) -> None:
        """Record how the run ended."""
        self._run.finish(exit_code=0 if state.good else 1)


class Sinks:
    """The sinks that a run asks for. One that fails is said once and left alone from then on.

    Args:
        run_dir: The run's folder.
        config: The run's configuration.
        say: Tells the user.
    """

    def __init__(self, run_dir: RunDir, *, config: Config, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Sink] = {}
        self._sent: dict[int, set[str]] = {}
        asked: dict[str, tuple[bool, Callable[..., Sink]]] = {
            "MLflow": (config.sinks.mlflow, MlflowSink),
            "W&B": (config.sinks.wandb, WandbSink),
        }
        for name, (wanted, sink) in asked.items():
            if wanted:
                self._start(name, sink, run_dir, config)

    def scalars(self, point: Point) -> None:
        """Record a point; steps that a retry repeats are recorded once."""
        newest = max(self._sent, default=-1)
        sent = self._sent.get(point.step, set())
        values = {tag: value for tag, value in point.values.items() if tag not in sent}
        if not self._open or point.step < newest or not values:
            return
        self._sent = {point.step: sent | set(values)}
        fresh = Point(point.step, point.time, values)
        self._each(lambda sink: sink.scalars(fresh))

    def close(self, state: State) -> None:
        """Record how the run ended."""
        self._each(lambda sink: sink.close(state))
        self._open.clear()

    def _start(self, name: str, sink: Callable[..., Sink], run_dir: RunDir, config: Config) -> None:
        try:
            self._open[name] = sink(run_dir, job=config.job.name, hparams=hparams_of(config))
        except Exception as error:  # of a library that no run depends on
            self._failed(name, error)

    def _each(self, do: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            try:
                do(sink)
            except Exception as error:  # of a library that no run depends on
                del self._open[name]
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        text = " ".join(str(error).split())
        self._say(f"{name} failed: {type(error).__name__}: {text}; the run goes on without it")
