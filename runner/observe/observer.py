"""The observer of one run: hands its events to figures, TensorBoard, journal and console.

A file that cannot be written is said once and tried again with the next event; it never
ends the run.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from runner.config.schema import Config
from runner.observe import histogram, tables
from runner.observe.display import Display
from runner.observe.hparams import hparams_of, named
from runner.observe.journal import Journal
from runner.observe.metrics import Point, Tally
from runner.observe.preflight import preflight_text
from runner.observe.sinks import Sinks
from runner.observe.tensorboard import TensorBoardWriter
from runner.record.events import Ended, Evaluated, Event, Preflighted, Saving, Started, Steps
from runner.record.outcome import Result, State
from runner.record.preflight import report_from_json
from runner.record.rundir import RunDir

#: Up to here the table of graphs is written anew with every compile, then when it doubles.
_SMALL_TABLE = 32


class Observer:
    """Sees a run through all its attempts.

    Args:
        run_dir: The run's folder.
        config: The run's configuration.
        console: Where the run is shown.
        logdir: What the final TensorBoard command opens: the folder of the sweep that the
            run belongs to, say. Default: the run's.
        earlier: The run's figures so far, if another process began it.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        config: Config,
        console: Display,
        logdir: pathlib.Path | None = None,
        earlier: Result | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._console = console
        self._logdir = logdir or run_dir.path
        self._tally = Tally(earlier=earlier)
        self._journal = Journal(run_dir.metrics)
        self._board = TensorBoardWriter(
            run_dir.tensorboard,
            hparams=functools.partial(hparams_of, config),
            named=lambda: named(run_dir.asked()),
        )
        self._step_times = histogram.StepTimeHistogram()
        self._said: set[str] = set()
        self._graphs_written = 0
        self._sinks = Sinks(run_dir, config=config, say=self._warn)

    def asked(self, config_yaml: str) -> None:
        """Take the configuration as text, secrets left out; before any event."""
        with self._survive("TensorBoard"):
            self._board.text("config", markdown=tables.config_block(config_yaml))

    def handle(self, event: Event) -> None:
        """Take an event of the worker."""
        point = self._tally.take(event)
        if isinstance(event, Started):
            self._begin(event)
        if point is not None:
            self._write(point)
        if isinstance(event, Steps):
            self._write_histogram(self._step_times.add(event.records))
        if isinstance(event, Saving):
            with self._survive("metrics.jsonl"):
                self._journal.sync()
        if isinstance(event, (Steps, Evaluated, Ended)):
            self._write_graphs(final=isinstance(event, Ended))
        if isinstance(event, Evaluated) and point is not None:
            self._compare_by([tag for tag in point.values if tag.startswith("eval/")])
            self._show(event)
        if isinstance(event, Preflighted) and point is not None:
            self._write_verdict(event, list(point.values))
        self._console.handle(event, point)

    def echo(self, line: str) -> None:
        """Show a line of the worker's log."""
        self._console.echo(line)

    @property
    def steps(self) -> int:
        """Completed optimizer updates."""
        return self._tally.steps

    def fill(self, outcome: Result) -> Result:
        """`outcome` with the run's figures: what result.json is to hold."""
        return self._tally.fill(outcome)

    def finish(self, result: Result) -> None:
        """The run is over: close the files and show the table."""
        if result.state is State.SUCCEEDED:
            self._compare_by([])
        self._write_graphs(final=True)
        self._write_histogram(self._step_times.rest())
        with self._survive("TensorBoard"):
            self._board.close(result.state)
        self._sinks.close(result.state)
        with self._survive("metrics.jsonl"):
            self._journal.close()
        self._console.close()
        self._console.summary(result, self._logdir)

    def _begin(self, event: Started) -> None:
        self._step_times.drop_after(event.first_step)
        with self._survive("metrics.jsonl"):
            self._journal.purge(event.first_step + 1)
        with self._survive("TensorBoard"):
            self._board.purge(event.first_step + 1)
            facts = {**self._environment(), "worker": dataclasses.asdict(event)}
            self._board.text(
                "environment",
                markdown=tables.environment_table(facts),
                step=event.first_step,
            )

    def _environment(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads(self._run_dir.environment.read_text())
        except FileNotFoundError:
            return {}
        return facts

    def _write(self, point: Point) -> None:
        with self._survive("metrics.jsonl"):
            self._journal.write(point)
        with self._survive("TensorBoard"):
            self._board.scalars(point)
        self._sinks.scalars(point)

    def _write_histogram(self, step_times: histogram.Histogram | None) -> None:
        if step_times is not None:
            with self._survive("TensorBoard"):
                self._board.histogram(histogram.TAG, step_times)

    def _write_graphs(self, *, final: bool) -> None:
        graphs = self._tally.compiles.graphs
        due = len(graphs) <= _SMALL_TABLE or len(graphs) >= 2 * self._graphs_written or final
        if len(graphs) == self._graphs_written or not due:
            return
        self._graphs_written = len(graphs)
        with self._survive("TensorBoard"):
            markdown = tables.graphs_table(graphs)
            self._board.text("compile/graphs", markdown=markdown, step=self._tally.steps)

    def _write_verdict(self, event: Preflighted, tags: list[str]) -> None:
        with self._survive("TensorBoard"):
            self._board.compare_by(tags)
            text = preflight_text(report_from_json(event.report))
            self._board.text("preflight", markdown=tables.text_block(text))

    def _show(self, event: Evaluated) -> None:
        with self._survive("TensorBoard"):
            for name, markdown in event.texts.items():
                self._board.text(f"eval/{name}", markdown=markdown, step=event.step)
            for name, png in event.images.items():
                self._board.image(f"eval/{name}", png=base64.b64decode(png), step=event.step)

    def _compare_by(self, eval_tags: list[str]) -> None:
        with self._survive("TensorBoard"):
            self._board.compare_by([*eval_tags, "train/loss", "compile/total_s", "step/time_ms"])

    @contextlib.contextmanager
    def _survive(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if what not in self._said:
                self._said.add(what)
                self._warn(f"cannot write {what}: {error}; the run goes on without it")

    def _warn(self, message: str) -> None:
        self._console.notice(message, warning=True)
