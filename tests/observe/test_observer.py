"""What a run leaves: event files read back with TensorBoard's own reader, metrics.jsonl."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata

from runner.config.schema import Config
from runner.observe.console import Console
from runner.observe.observer import Observer
from runner.record.events import Evaluated, Event, Steps
from runner.record.outcome import Result, State
from runner.record.rundir import RunDir
from tests.observe.conftest import graph, recorded_run, started, steps_event

Read = Callable[[pathlib.Path], Any]

EVERY_STEP = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "compile/recompiles",
    "compile/first_step_s",
    "memory/device_bytes",
    "memory/host_rss_bytes",
    "goodput/productive_fraction",
}
NOT_COMPILED = {
    "step/time_ms",
    "step/host_ms",
    "step/data_wait_ms",
    "step/programs",
    "throughput/examples_per_s",
    "throughput/tokens_per_s",
    "util/mfu",
}

YAML = "job:\n  name: toy\n"


def observe(
    run_dir: RunDir, config: Config, events: list[Event], *, state: State = State.SUCCEEDED
) -> Result:
    console = Console(stderr=io.StringIO(), stdout=io.StringIO())
    observer = Observer(run_dir, config=config, console=console)
    observer.asked(YAML)
    for event in events:
        observer.handle(event)
    result = observer.fill(Result("toy", "openxla", state, 0))
    observer.finish(result)
    return result


def points(reader: Any) -> dict[tuple[str, int], float]:
    """The newest value of each tag at each step."""
    return {
        (tag, scalar.step): scalar.value
        for tag in reader.Tags()["scalars"]
        for scalar in reader.Scalars(tag)
    }


def journal(run_dir: RunDir) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    lines = run_dir.metrics.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_every_tag_of_the_contract_has_as_many_points_as_logged_steps(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    observe(run_dir, config, recorded_run())
    reader = read(run_dir.tensorboard)
    steps_of = {t: [s.step for s in reader.Scalars(t)] for t in reader.Tags()["scalars"]}
    evals = {"eval/loss", "eval/accuracy"}
    assert set(steps_of) == EVERY_STEP | NOT_COMPILED | evals | {"compile/count", "compile/total_s"}
    assert {t: steps_of[t] for t in EVERY_STEP - {"compile/recompiles"}} == {
        t: [1, 2, 3, 4, 5, 6] for t in EVERY_STEP - {"compile/recompiles"}
    }
    assert {t: steps_of[t] for t in NOT_COMPILED} == {t: [2, 3, 4, 5, 6] for t in NOT_COMPILED}
    assert {t: steps_of[t] for t in evals} == {t: [3, 6] for t in evals}
    # An evaluation that compiled gives a point of its own.
    assert steps_of["compile/count"] == [1, 2, 3, 3, 4, 5, 6]


def test_tensorboard_journal_and_result_agree(run_dir: RunDir, config: Config, read: Read) -> None:
    result = observe(run_dir, config, recorded_run())
    in_board = points(read(run_dir.tensorboard))
    in_journal = {
        (tag, entry["step"]): value
        for entry in journal(run_dir)
        for tag, value in entry.items()
        if tag not in ("step", "time")
    }
    assert in_board == pytest.approx(in_journal, rel=1e-6)
    for tag, value in result.final.items():
        assert in_journal[tag, 6] == value
    assert in_journal["compile/total_s", 6] == result.compile.total_s
    assert in_journal["compile/count", 6] == result.compile.count


def test_texts_show_configuration_environment_and_graphs(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    observe(run_dir, config, [*recorded_run(), graph("step", step=6, recompile=True)])
    reader = read(run_dir.tensorboard)
    texts = {
        tag: reader.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in ("config", "environment", "compile/graphs")
    }
    assert texts["config"] == "```yaml\njob:\n  name: toy\n```"
    assert "| git.commit | abc |" in texts["environment"]
    assert "| worker.versions.torch | 2.9.0 |" in texts["environment"]
    rows = texts["compile/graphs"].splitlines()
    assert (
        rows[2]
        == "| forward | 120 | 0.500 | 1.500 | 0.00 | 0 | first call | norms 3, sums 2 | abc |"
    )
    assert len(rows) == 6
    assert "**recompile** input 0: float32[32] -> float32[16] \\| x" in rows[5]
    content = reader.SummaryMetadata("config").plugin_data
    assert content.plugin_name == "text"


def test_the_custom_scalars_put_compile_and_step_time_side_by_side(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    observe(run_dir, config, recorded_run())
    tensor = read(run_dir.tensorboard).Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor.string_val[0])
    assert [chart.title for chart in layout.category[0].chart] == [
        "compile time (s)",
        "step time (ms)",
    ]


def hparams_of(reader: Any) -> tuple[Any, Any, Any]:
    content = reader.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    end = None
    if metadata.SESSION_END_INFO_TAG in content:
        end = metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG])
    return start, experiment, end


def test_what_the_command_line_names_are_the_first_columns_of_hparams(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    run_dir.overrides.write_text("job=toy\noptim.lr=0.1\nbackend=openxla\n+steps=60\n")
    observe(run_dir, config, recorded_run())
    _, experiment, _ = hparams_of(read(run_dir.tensorboard))
    first = {info.name for info in experiment.hparam_infos if info.differs}
    assert first == {"job.name", "optim.lr", "backend.name", "steps"}
    assert len(experiment.hparam_infos) > 20


def test_hparams_are_in_the_same_run_with_the_metrics_that_compare_jobs(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    observe(run_dir, config, recorded_run())
    assert len(list(run_dir.tensorboard.iterdir())) == 1
    start, experiment, end = hparams_of(read(run_dir.tensorboard))
    assert start.hparams["optim.lr"].number_value == 0.1
    assert start.hparams["optim.options.momentum"].number_value == 0.9
    assert start.hparams["data.options.flip"].bool_value is True
    assert start.hparams["precision"].string_value == "float32"
    assert start.hparams["grad_clip_norm"].string_value == "null"
    assert {info.name for info in experiment.hparam_infos} == set(start.hparams)
    assert [info.name.tag for info in experiment.metric_infos] == [
        "eval/loss",
        "eval/accuracy",
        "train/loss",
        "compile/total_s",
        "step/time_ms",
    ]
    assert end.status == api_pb2.STATUS_SUCCESS


@pytest.mark.parametrize(
    ("state", "status"),
    [(State.FAILED, api_pb2.STATUS_FAILURE), (State.TIMED_OUT, api_pb2.STATUS_FAILURE)],
)
def test_a_run_that_failed_is_a_failed_session(
    run_dir: RunDir, config: Config, read: Read, state: State, status: int
) -> None:
    observe(run_dir, config, recorded_run(), state=state)
    assert hparams_of(read(run_dir.tensorboard))[2].status == status


def test_a_preempted_run_that_is_resumed_ends_as_a_success_without_repeated_points(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    observe(
        run_dir,
        config,
        [started(), steps_event(1, 2), *map(steps_event, (3, 4))],
        state=State.PREEMPTED,
    )
    observe(run_dir, config, [started(first_step=2), *map(steps_event, (3, 4, 5))])
    reader = read(run_dir.tensorboard)
    assert [s.step for s in reader.Scalars("train/loss")] == [2, 3, 4, 5]
    assert [entry["step"] for entry in journal(run_dir)] == [2, 3, 4, 5]
    assert hparams_of(reader)[2].status == api_pb2.STATUS_SUCCESS


def test_what_a_job_shows_is_there_at_its_step_and_once(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (7, 5), "red").save(file, "PNG")
    png = base64.b64encode(file.getvalue()).decode()
    evaluated = Evaluated(2, {"loss": 0.5}, 10, 0.1, texts={"words": "a *b*"}, images={"row": png})
    observe(run_dir, config, [started(), *map(steps_event, (1, 2)), evaluated, evaluated])
    reader = read(run_dir.tensorboard)
    (words,), (row,) = reader.Tensors("eval/words"), reader.Tensors("eval/row")
    assert (words.step, words.tensor_proto.string_val[0]) == (2, b"a *b*")
    assert (row.step, list(row.tensor_proto.string_val)) == (2, [b"7", b"5", file.getvalue()])
    assert reader.SummaryMetadata("eval/row").plugin_data.plugin_name == "images"


def test_a_retry_leaves_each_step_once(run_dir: RunDir, config: Config, read: Read) -> None:
    first = [started(), *map(steps_event, (1, 2, 3, 4))]
    result = observe(run_dir, config, [*first, started(2), *map(steps_event, (3, 4, 5, 6))])
    steps = [1, 2, 3, 4, 5, 6]
    assert [s.step for s in read(run_dir.tensorboard).Scalars("step/time_ms")] == steps
    assert [entry["step"] for entry in journal(run_dir)] == steps
    assert result.steps == 6


def test_a_journal_that_a_crash_cut_short_is_continued_with_whole_lines(
    run_dir: RunDir, config: Config
) -> None:
    run_dir.metrics.write_text('{"step":1,"time":1.0}\n{"step":2,"ti')
    observe(run_dir, config, [started(first_step=1), steps_event(2)])
    assert [entry["step"] for entry in journal(run_dir)] == [1, 2]


def test_a_loss_that_is_no_number_is_strict_json(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    bad = dataclasses.replace(steps_event(2), metrics={"loss": float("nan")})
    observe(run_dir, config, [started(), steps_event(1), bad], state=State.FAILED)
    assert journal(run_dir)[-1]["train/loss"] == "NaN"
    value = read(run_dir.tensorboard).Scalars("train/loss")[-1].value
    assert value != value


def test_everything_is_in_the_files_before_the_next_event(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    console = Console(stderr=io.StringIO(), stdout=io.StringIO())
    observer = Observer(run_dir, config=config, console=console)
    observer.asked(YAML)
    for event in (started(), steps_event(1), steps_event(2)):
        observer.handle(event)
    assert [s.step for s in read(run_dir.tensorboard).Scalars("train/loss")] == [1, 2]
    assert len(journal(run_dir)) == 2
    observer.finish(Result("toy", "openxla", State.FAILED, 70))


FULL_DISK = """
import io, pathlib, pickle, resource, sys
from runner.observe.console import Console
from runner.observe.observer import Observer
from runner.record.outcome import Result, State
from runner.record.rundir import RunDir

config, events = pickle.loads(sys.stdin.buffer.read())
run_dir, err = RunDir(pathlib.Path(sys.argv[1])), io.StringIO()
console = Console(stderr=err, stdout=io.StringIO())
observer = Observer(run_dir, config=config, console=console)
observer.asked("seed: 1")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for number, event in enumerate(events):
    if number == 20:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    if number == 40:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    observer.handle(event)
observer.finish(Result("toy", "openxla", State.SUCCEEDED, 0))
print(err.getvalue().count("cannot write"), "File too large" in err.getvalue())
"""


def test_a_disk_without_room_is_said_once_a_file_and_nothing_is_missing_when_there_is_room(
    run_dir: RunDir, config: Config, read: Read
) -> None:
    """A limit on the size of files cuts writes short, as a full disk does."""
    events: list[Event] = [started(), *(steps_event(step) for step in range(1, 60))]
    assert all(isinstance(event, Steps) for event in events[1:])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(run_dir.path)],
        input=pickle.dumps((config, events)),
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().split() == ["2", "True"], done.stderr.decode()
    expected = list(range(1, 60))
    assert [entry["step"] for entry in journal(run_dir)] == expected
    assert [s.step for s in read(run_dir.tensorboard).Scalars("train/loss")] == expected


def test_observing_needs_no_torch() -> None:
    code = (
        "import sys, runner.observe.observer; "
        "print([m for m in ('torch', 'torch_xla', 'jax', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
