"""`python -m runner` as a user starts it, and what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runner.observe.operations import costs_of
from runner.observe.xplane import read_xplane

STEPS = 12
EVAL_EVERY = 5
STEP_TAGS = {
    "step/time_ms",
    "step/host_ms",
    "step/data_wait_ms",
    "step/programs",
    "throughput/examples_per_s",
    "util/mfu",
}
LOGGED_TAGS = {
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "compile/count",
    "compile/total_s",
    "compile/recompiles",
    "compile/first_step_s",
    "memory/device_bytes",
    "memory/host_rss_bytes",
    "goodput/productive_fraction",
}


def start(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the runner in a folder, as from a shell."""
    return subprocess.run(
        [sys.executable, "-m", "runner", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
    )


def only_run(folder: pathlib.Path) -> pathlib.Path:
    (run,) = (folder / "outputs" / "mlp").iterdir()
    return run


def losses(run: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A short run of the smallest job on the default backend, in a folder with a space."""
    folder = tmp_path_factory.mktemp("a folder")
    done = start(
        folder,
        "job=mlp",
        f"steps={STEPS}",
        f"eval_every={EVAL_EVERY}",
        "hardware.peak_flops_per_s=1e11",
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return only_run(folder), done.stdout


@pytest.fixture(scope="module")
def events(trained: tuple[pathlib.Path, str]) -> EventAccumulator:
    accumulator = EventAccumulator(str(trained[0] / "tb"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def steps_of(events: EventAccumulator, tag: str) -> list[int]:
    return [point.step for point in events.Scalars(tag)]


def test_every_logged_step_has_a_point_under_every_tag(events: EventAccumulator) -> None:
    tags = set(events.Tags()["scalars"])
    assert tags >= LOGGED_TAGS | STEP_TAGS | {"eval/accuracy", "eval/loss"}
    for tag in ("train/loss", "train/lr", "train/grad_norm"):
        assert steps_of(events, tag) == list(range(1, STEPS + 1))
    for tag in LOGGED_TAGS:
        assert set(steps_of(events, tag)) >= set(range(1, STEPS + 1)), tag
    assert steps_of(events, "eval/accuracy") == [EVAL_EVERY, 2 * EVAL_EVERY, STEPS]


def test_steps_that_compiled_are_kept_out_of_step_time(events: EventAccumulator) -> None:
    for tag in STEP_TAGS:
        assert steps_of(events, tag) == list(range(2, STEPS + 1)), tag
    first_step_ms = 1e3 * events.Scalars("compile/first_step_s")[0].value
    assert max(p.value for p in events.Scalars("step/time_ms")) < first_step_ms


def test_result_journal_and_tensorboard_agree(
    trained: tuple[pathlib.Path, str], events: EventAccumulator
) -> None:
    run, _ = trained
    result = json.loads((run / "result.json").read_text())
    journal = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (result["state"], result["exit_code"], result["steps"]) == ("succeeded", 0, STEPS)
    for tag in ("train/loss", "step/time_ms", "compile/total_s"):
        in_journal = [(line["step"], line[tag]) for line in journal if tag in line]
        shown = [(point.step, pytest.approx(point.value)) for point in events.Scalars(tag)]
        assert in_journal == shown
    assert result["final"]["eval/accuracy"] == pytest.approx(
        events.Scalars("eval/accuracy")[-1].value
    )
    assert result["compile"]["recompiles"] == 0
    assert result["backend"] == "openxla_step"
    assert [graph["role"] for graph in result["compile"]["graphs"]] == ["step", "eval"]
    assert result["step"]["programs_per_step"] == 1
    assert 0 < result["mfu"] < 10


def test_several_steps_a_call_log_the_same_losses_as_single_ones(
    trained: tuple[pathlib.Path, str], tmp_path: pathlib.Path
) -> None:
    asked = ("backend.steps_per_call=4", "profile.steps=[6,7]")
    done = start(tmp_path, "job=mlp", f"steps={STEPS}", *asked)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    assert losses(run) == losses(trained[0])
    assert "profile of updates 5 to 8" in done.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["step"]["programs_per_step"] == pytest.approx(1 / 4)
    profiled_steps_are_not_timed(run, profiled={5, 6, 7, 8}, compiled={1, 2, 3, 4})
    explained = start(tmp_path, "explain", str(run)).stdout
    assert "in 4 updates" in explained
    # The command prints the dearest alone, which are others on a busy machine.
    (trace,) = run.glob("tb/plugins/profile/*/*.xplane.pb")
    operations = costs_of(read_xplane(trace)).operations
    assert {one.phase for one in operations} >= {"forward", "backward", "optimizer"}
    assert "2.layers.1" in {one.module for one in operations}


def profiled_steps_are_not_timed(
    run: pathlib.Path, *, profiled: set[int], compiled: set[int]
) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = {line["step"] for line in lines if "step/time_ms" in line}
    assert timed == set(losses(run)) - profiled - compiled


def test_the_openxla_backend_compiles_forward_backward_and_optimizer(
    tmp_path: pathlib.Path,
) -> None:
    done = start(tmp_path, "job=mlp", "steps=5", "backend=openxla", "profile.steps=[3,4]")
    assert done.returncode == 0, done.stderr
    profiled_steps_are_not_timed(only_run(tmp_path), profiled={3, 4}, compiled={1})
    explained = start(tmp_path, "explain", str(only_run(tmp_path))).stdout
    assert "in 2 updates" in explained
    assert "openxla_step only" in explained
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    roles = {graph["role"] for graph in result["compile"]["graphs"]}
    assert roles == {"forward", "backward", "optimizer", "eval"}
    assert result["step"]["programs_per_step"] == 3
    assert result["compile"]["recompiles"] == 0


def test_explain_says_what_it_lacks(trained: tuple[pathlib.Path, str]) -> None:
    run, _ = trained
    for asked, said in (
        (str(run), "has no profile: start a run with profile.steps="),
        (str(run / "tb"), "explain needs a run folder"),
    ):
        done = start(run, "explain", asked)
        assert done.returncode == 64
        assert said in done.stderr


def test_every_evaluation_shows_examples(events: EventAccumulator) -> None:
    pictures = events.Tensors("eval/examples")
    assert [picture.step for picture in pictures] == [EVAL_EVERY, 2 * EVAL_EVERY, STEPS]
    width, height, png = pictures[-1].tensor_proto.string_val
    assert Image.open(io.BytesIO(png)).size == (int(width), int(height))


def test_texts_and_hparams_are_in_the_same_run(events: EventAccumulator) -> None:
    tensors = set(events.Tags()["tensors"])
    assert tensors >= {"config", "environment", "compile/graphs"}
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


def test_the_end_shows_a_table_and_the_tensorboard_command(
    trained: tuple[pathlib.Path, str],
) -> None:
    run, output = trained
    assert "succeeded" in output
    assert f"tensorboard --logdir '{run}'" in output.replace("\n", "")


def test_a_sweep_runs_every_job_in_a_process_of_its_own_and_one_failure_ends_none(
    tmp_path: pathlib.Path,
) -> None:
    done = start(
        tmp_path,
        "-m",
        "job=mlp",
        "backend=eager",
        "steps=4",
        "optim.lr=0.01,1e30,0.02",
    )
    assert done.returncode == 1, done.stderr
    (sweep,) = (tmp_path / "multirun").iterdir()
    results: list[Any] = [
        json.loads((sweep / f"{number}-mlp" / "result.json").read_text()) for number in range(3)
    ]
    assert [result["exit_code"] for result in results] == [0, 72, 0]
    assert f"tensorboard --logdir {sweep}" in done.stdout.replace("\n", "")


def test_evaluation_alone_uses_the_bridge_without_autograd(tmp_path: pathlib.Path) -> None:
    done = start(tmp_path, "job=mlp", "mode=evaluate", "backend=openxla_eval")
    assert done.returncode == 0, done.stderr
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert 0.0 <= result["final"]["eval/accuracy"] < 0.5
    assert [graph["role"] for graph in result["compile"]["graphs"]] == ["eval"]


def test_a_missing_data_root_ends_with_65_and_names_it(tmp_path: pathlib.Path) -> None:
    done = start(
        tmp_path, "job=resnet", "backend=eager", "data=imagefolder", f"data.root={tmp_path}/none"
    )
    assert done.returncode == 65
    assert f"{tmp_path}/none" in done.stderr
