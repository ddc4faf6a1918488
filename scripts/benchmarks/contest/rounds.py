"""Runs the contestants of a model against each other: a process each, stepped in turns.

Only one computes at a time; the order is turned round after every round, so that whatever
else the machine does hits all alike. A contestant that fails becomes a row that says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from contest.bystanders import Bystanders
from contest.roster import MODELS

BENCHMARKS = pathlib.Path(__file__).parents[1]
ROOT = BENCHMARKS.parents[1]
#: Names the file with weights and batches, for a child that does not speak PyTorch.
WEIGHTS = "CONTEST_WEIGHTS"
#: Seconds that a contestant has for one request: a compile, or a turn.
ANSWER_S = 120


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        firsts: First steps of every contestant, each in a process of its own.
        rounds: Turns that every contestant gets.
        steps: Updates in a turn's timed burst; None for as many as suit the model.
        probes: Single calls in a turn, for host time.
        apart: One contestant after another, where one process holds the device (a TPU).
    """

    firsts: int
    rounds: int
    steps: int | None
    probes: int
    apart: bool


@dataclasses.dataclass
class Row:
    """A contestant's figures on a model; milliseconds are of one optimizer update."""

    model: str
    contestant: str
    error: str | None = None
    parameters: int | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    first_step_s: float | None = None
    first_compile_s: float | None = None
    compile_s: float | None = None
    compiles: int | None = None
    recompiles: int | None = None
    step_median_ms: float | None = None
    step_p95_ms: float | None = None
    host_ms: float | None = None
    after_ms: float | None = None
    waited_ms: float | None = None
    binding_ms: float | None = None
    program_ms: float | None = None
    host_to_binding: float | None = None
    arguments: int | None = None
    programs_per_step: float | None = None
    device_bytes: int | None = None
    device_bytes_source: str | None = None
    to_openxla_step: float | None = None
    others_cpu_share: float = 0.0
    bursts_ms: list[float] = dataclasses.field(default_factory=list)
    first_steps_s: list[float] = dataclasses.field(default_factory=list)
    first_compiles_s: list[float] = dataclasses.field(default_factory=list)


class ContestantFailed(Exception):
    """A child process ended; the message is the last line that it wrote."""


class Entrant:
    """A contestant's process and what it has answered."""

    def __init__(self, row: Row, *, environment: dict[str, str]) -> None:
        self.row = row
        self._samples: dict[str, list[float]] = {}
        # A file, not a pipe, which nobody would empty while an answer is awaited.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "contest.child", row.model, row.contestant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.pid = self._process.pid

    def attempt(self, work: Callable[[Entrant], None]) -> None:
        """Do some work of this entrant's, unless it has failed before."""
        if self.row.error is None:
            try:
                work(self)
            except ContestantFailed as failure:
                self.row.error = str(failure)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            ContestantFailed: The process ended instead.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises as `ask` does."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_S)
        if not ready:
            self._process.kill()
            self._process.wait()
            raise ContestantFailed(f"no answer within {ANSWER_S} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = [text.strip() for text in self._log if text.strip()]
            raise ContestantFailed(said[-1] if said else f"ended with code {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ready(self) -> None:
        """Wait until the process has imported what it needs, which nobody's clock counts."""
        self.answer()

    def first(self) -> None:
        """The first step; those of its forerunners, if any, are in the row already."""
        row, answer = self.row, self.ask(do="first")
        row.first_steps_s.append(answer["first_step_s"])
        row.first_compiles_s.append(answer["first_compile_s"])

    def warm(self) -> None:
        """The rest of what comes before the first timed burst."""
        self._fill(self.ask(do="warm"))

    def turn(self, effort: Effort) -> None:
        """One round's burst and probes."""
        burst = self.ask(do="burst", steps=effort.steps or MODELS[self.row.model])
        self.row.bursts_ms.append(burst["step_ms"])
        self.row.programs_per_step = burst["programs_per_step"]
        probe = self.ask(do="probe", calls=effort.probes)
        self.row.arguments = probe.pop("arguments", None)
        for key, values in probe.items():
            self._samples.setdefault(key, []).extend(values)

    def finish(self) -> None:
        """Counts, and medians over all rounds."""
        row = self.row
        self._fill(self.ask(do="facts"))
        self._fill({k: statistics.median(v) for k, v in self._samples.items() if v})
        row.first_step_s = statistics.median(row.first_steps_s)
        row.first_compile_s = statistics.median(row.first_compiles_s)
        row.step_median_ms = statistics.median(row.bursts_ms)
        row.step_p95_ms = p95(row.bursts_ms)
        row.host_to_binding = ratio(row.host_ms, row.binding_ms)

    def close(self) -> None:
        """End the process: its requests are over."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _fill(self, figures: dict[str, Any]) -> None:
        for key, value in figures.items():
            setattr(self.row, key, value)


def compare(
    model: str, names: Sequence[str], *, effort: Effort, say: Callable[[str], None]
) -> list[Row]:
    """The contestants' rows on a model, in their order.

    Args:
        model: One of `MODELS`.
        names: Contestants.
        effort: How much is measured.
        say: Is told what is going on.
    """
    assert model in MODELS
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(folder)
        if "jax" in names:
            say(f"{model}: weights")
            weights = [sys.executable, "-m", "contest.models", model, environment[WEIGHTS]]
            subprocess.run(weights, check=True, env=environment)
        fields = [[name] for name in names] if effort.apart else [list(names)]
        rows: list[Row] = []
        for field in fields:
            rows += _run(model, field, effort=effort, environment=environment, say=say)
    base = next((row.step_median_ms for row in rows if row.contestant == "openxla_step"), None)
    for row in rows:
        row.to_openxla_step = ratio(row.step_median_ms, base)
    return rows


def _run(
    model: str,
    names: Sequence[str],
    *,
    effort: Effort,
    environment: dict[str, str],
    say: Callable[[str], None],
) -> list[Row]:
    rows = [Row(model, name) for name in names]
    for number in range(1, effort.firsts):
        say(f"{model}: first steps, {number} of {effort.firsts}")
        for row in rows if number % 2 == 0 else reversed(rows):
            _forerun(row, environment=environment)
    with contextlib.ExitStack() as stack:
        say(f"{model}: starting {len(names)} processes")
        entrants = [Entrant(row, environment=environment) for row in rows]
        for entrant in entrants:
            stack.callback(entrant.close)
        for entrant in entrants:
            entrant.attempt(Entrant.ready)
        for entrant in entrants:
            say(f"{model}: first step of {entrant.row.contestant}")
            entrant.attempt(Entrant.first)
            entrant.attempt(Entrant.warm)
        bystanders = Bystanders([entrant.pid for entrant in entrants])
        for number in range(effort.rounds):
            say(f"{model}: round {number + 1} of {effort.rounds}")
            for entrant in entrants if number % 2 == 0 else reversed(entrants):
                entrant.attempt(lambda one: one.turn(effort))
        others = bystanders.share()
        for entrant in entrants:
            entrant.row.others_cpu_share = others
            entrant.attempt(Entrant.finish)
        return rows


def _forerun(row: Row, *, environment: dict[str, str]) -> None:
    """One more first step, of a process that does nothing else."""
    with contextlib.closing(Entrant(row, environment=environment)) as entrant:
        entrant.attempt(Entrant.ready)
        entrant.attempt(Entrant.first)


def _environment(folder: str) -> dict[str, str]:
    path = [str(BENCHMARKS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        WEIGHTS: str(pathlib.Path(folder) / "weights.npz"),
    }
    if environment["PJRT_DEVICE"] == "CPU":
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def ratio(value: float | None, base: float | None) -> float | None:
    """value / base, where both are known."""
    return None if value is None or not base else value / base


def p95(values: Sequence[float]) -> float:
    """The 95th percentile, interpolated."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=20, method="inclusive")[-1]
