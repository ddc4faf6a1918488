"""MLflow and Weights & Biases by their own libraries, offline, read back by them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import pytest

from runner.config.schema import Config, SinksConfig
from runner.observe.observer import Observer
from runner.record.outcome import Result, State
from runner.record.rundir import RunDir
from tests.observe.conftest import recorded_run, started, steps_event

ROOT = pathlib.Path(__file__).parents[2]
#: Reads a file store back: metric -> [step, value] of each point, settings, status.
READ_MLFLOW = """
import json, os, pathlib, sys
os.environ.update(MLFLOW_ALLOW_FILE_STORE="true", MLFLOW_DISABLE_TELEMETRY="true")
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=pathlib.Path(sys.argv[1]).as_uri())
(run,) = client.search_runs([client.get_experiment_by_name(sys.argv[2]).experiment_id])
history = {
    tag: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, tag)]
    for tag in run.data.metrics
}
print(json.dumps([history, run.data.params, run.info.status]))
"""
#: Reads an offline run back, a log of LevelDB's format behind a header of 7 bytes: every record
#: of its history.
READ_WANDB = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2
data, at, rows, record = open(sys.argv[1], "rb").read(), 7, [], b""
while at < len(data):
    if 32768 - at % 32768 < 7:  # what is left of a block is padding
        at += 32768 - at % 32768
        continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    record += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or the last part
        parsed, record = wandb_internal_pb2.Record.FromString(record), b""
        if parsed.WhichOneof("record_type") == "history":
            items = parsed.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
print(json.dumps(rows))
"""


def python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def start(folder: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "runner", "job=mlp", "steps=6", "eval_every=3", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home)},
        capture_output=True,
        text=True,
    )


def test_both_have_the_points_of_the_journal_and_nothing_is_written_elsewhere(
    tmp_path: pathlib.Path,
) -> None:
    done = start(tmp_path, "sinks.mlflow=true", "sinks.wandb=true", "backend=eager")
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    (run,) = (tmp_path / "outputs" / "mlp").iterdir()
    points: dict[str, list[list[float]]] = {}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for tag in set(line) - {"step", "time"}:
            points.setdefault(tag, []).append([line["step"], line[tag]])
    history, params, status = json.loads(python(READ_MLFLOW, run / "mlflow", "mlp"))
    assert history == points
    assert len(points["train/loss"]) == 6
    assert (params["steps"], params["optim.lr"], status) == ("6", "0.02", "FINISHED")
    (offline,) = run.glob("wandb/offline-run-*/*.wandb")
    in_wandb: dict[str, list[list[float]]] = {}
    for row in json.loads(python(READ_WANDB, offline)):
        for tag in set(row) & set(points):
            in_wandb.setdefault(tag, []).append([row["updates"], row[tag]])
    assert in_wandb == points
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert {path.name for path in tmp_path.iterdir()} == {"home", "outputs"}


class Lines:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def handle(self, event: object, point: object = None) -> None: ...
    def echo(self, line: str) -> None: ...
    def close(self) -> None: ...
    def summary(self, result: object, logdir: object) -> None: ...

    def notice(self, message: str, *, warning: bool = False) -> None:
        self.notices.append(message)


def mlflow_alone(config: Config) -> Config:
    return dataclasses.replace(config, sinks=SinksConfig(mlflow=True))


def test_a_store_that_goes_away_is_said_once_and_the_run_goes_on(
    run_dir: RunDir, config: Config
) -> None:
    display = Lines()
    observer = Observer(run_dir, config=mlflow_alone(config), console=display)
    for number, event in enumerate(recorded_run()):
        if number == 10:
            shutil.rmtree(run_dir.path / "mlflow")
            (run_dir.path / "mlflow").write_text("in the way")
        observer.handle(event)
    observer.finish(Result("toy", "openxla", State.SUCCEEDED, 0))
    (said,) = display.notices
    assert said.startswith("MLflow failed: ")
    assert said.endswith("the run goes on without it")
    assert json.loads(run_dir.metrics.read_text().splitlines()[-1])["step"] == 6


def test_steps_that_a_retry_repeats_are_recorded_once(run_dir: RunDir, config: Config) -> None:
    observer = Observer(run_dir, config=mlflow_alone(config), console=Lines())
    again = [started(first_step=2), *map(steps_event, (3, 4, 5))]
    for event in (started(), *map(steps_event, (1, 2, 3, 4)), *again):
        observer.handle(event)
    observer.finish(Result("toy", "openxla", State.FAILED, 70))
    history, _, status = json.loads(python(READ_MLFLOW, run_dir.path / "mlflow", "toy"))
    assert [step for step, _ in history["train/loss"]] == [1, 2, 3, 4, 5]
    assert status == "FAILED"


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_sink_that_is_not_installed_ends_with_64_and_names_the_extra(
    tmp_path: pathlib.Path, name: str
) -> None:
    hidden = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {name!r} else find(n, *a)\n"
        "from runner.__main__ import main\n"
        f"sys.argv = ['runner', 'job=mlp', 'sinks.{name}=true']\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 64, done.stderr
    assert f"sinks.{name} must be false" in done.stderr
    assert "the extra `sinks`" in done.stderr
    assert list(tmp_path.iterdir()) == []


KILLED_CORE = """
import io, pathlib, pickle, psutil, sys
from runner.observe.console import Console
from runner.observe.observer import Observer
from runner.record.outcome import Result, State
from runner.record.rundir import RunDir

config, events = pickle.loads(sys.stdin.buffer.read())
run_dir, err = RunDir(pathlib.Path(sys.argv[1])), io.StringIO()
console = Console(stderr=err, stdout=io.StringIO())
observer = Observer(run_dir, config=config, console=console)
for number, event in enumerate(events):
    if number == 10:
        (core,) = psutil.Process().children(recursive=True)
        core.kill()
        core.wait()
    observer.handle(event)
observer.finish(Result("toy", "openxla", State.SUCCEEDED, 0))
print(err.getvalue().count("W&B failed: "), "torch" in sys.modules)
"""


def test_a_wandb_process_that_is_killed_is_said_once_and_the_run_goes_on(
    run_dir: RunDir, config: Config
) -> None:
    asked = dataclasses.replace(config, sinks=SinksConfig(wandb=True))
    done = subprocess.run(
        [sys.executable, "-c", KILLED_CORE, str(run_dir.path)],
        input=pickle.dumps((asked, recorded_run())),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == ["1", "False"]
    assert json.loads(run_dir.metrics.read_text().splitlines()[-1])["step"] == 6
