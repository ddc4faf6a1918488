"""`mode=preflight` as a user starts it: the verdict, exit codes, the cache, several at once."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ("mode=preflight", "job=mlp", "hardware=v5e-1", "model.width=64")

JOB = """
import torch
from jobs.mlp import MLP

class Median(MLP):
    def loss(self, model, batch):
        return model(batch["image"]).median()

class Huge(MLP):
    def build(self):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(576, self.width), torch.nn.Linear(self.width, 10)
        )
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "runner", *arguments]


def environment(folder: pathlib.Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{folder}",
        "RUNNER_TRUST": "mine",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "COLUMNS": "160",
    }


def start(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the runner in a folder, as from a shell."""
    (folder / "mine.py").write_text(JOB)
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(folder),
    )


def result_of(folder: pathlib.Path) -> dict[str, Any]:
    newest = max((folder / "outputs" / "mlp").iterdir())
    result: dict[str, Any] = json.loads((newest / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A preflight of the smallest job, with everything that it leaves."""
    folder = tmp_path_factory.mktemp("a folder")
    done = start(folder, *SMALL, "preflight.dump=true")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_verdict_is_in_result_json(judged: tuple[pathlib.Path, str]) -> None:
    result = result_of(judged[0])
    report = result["preflight"]
    assert (result["state"], result["exit_code"], result["steps"]) == ("succeeded", 0, 0)
    assert report["fits"] is True
    assert report["hbm"]["total"] < report["hbm"]["capacity"]
    assert report["roof"]["binds"] == "hbm"
    assert report["estimate"]["cycles"] > 0
    assert {row["module"] for row in report["estimate"]["modules"]} >= {"1", "(optimizer)"}
    assert report["largest"][0]["what"].startswith(("params/", "optimizer/", "batch/"))
    assert result["final"]["preflight/fits"] == 1.0


def test_the_verdict_is_shown(judged: tuple[pathlib.Path, str]) -> None:
    shown = judged[1]
    for said in ("memory of a chip", "model FLOPs", "roof", "compiler's estimate", "fits: needs"):
        assert said in shown
    assert "A roof is a bound, not a prediction" in shown


def test_explain_lists_the_dearest_operations(judged: tuple[pathlib.Path, str]) -> None:
    folder, _ = judged
    done = start(folder, "explain", str(max((folder / "outputs" / "mlp").iterdir())))
    assert done.returncode == 0, done.stderr
    assert "by the TPU compiler's estimate" in done.stdout
    assert len(re.findall(r"\d% *$", done.stdout, re.MULTILINE)) >= 5


def test_the_dump_has_the_program_before_and_after(judged: tuple[pathlib.Path, str]) -> None:
    run = max((judged[0] / "outputs" / "mlp").iterdir())
    before = (run / "step.stablehlo.mlir").read_text()
    assert "jax.buffer_donor" in before
    assert '"params/1.weight"' in before
    assert '"forward/1/addmm"' in before
    assert "input_output_alias" in (run / "step.optimized.hlo").read_text()
    assert (run / "memory_report.txt").read_text().startswith("BufferAssignment")


def test_the_same_program_is_answered_from_the_cache(judged: tuple[pathlib.Path, str]) -> None:
    folder, _ = judged
    done = start(folder, *SMALL, "optim.lr=0.5", "steps=7")
    assert done.returncode == 0, done.stderr
    assert result_of(folder)["preflight"]["cached"] is True
    assert "from the cache" in done.stdout
    for asked in ("preflight.cache=false", "preflight.dump=true"):
        assert start(folder, *SMALL, asked).returncode == 0
        assert result_of(folder)["preflight"]["cached"] is False
    assert (max((folder / "outputs" / "mlp").iterdir()) / "step.optimized.hlo").exists()


def test_the_cache_answers_of_the_slice_that_was_asked_about(
    judged: tuple[pathlib.Path, str],
) -> None:
    """One chip of v5e-4 takes the program that v5e-1 takes, and is called otherwise."""
    folder, _ = judged
    done = start(folder, *SMALL, "hardware=v5e-4")
    assert done.returncode == 0, done.stderr
    assert result_of(folder)["preflight"]["hardware"] == "v5e-4"
    assert "on the one chip of v5e-4's 4 that is used" in done.stdout


def test_too_large_ends_with_71_and_says_by_how_much(tmp_path: pathlib.Path) -> None:
    large = ("job.entry=mine:Huge", "model.width=4000000", "job.batch_size=4")
    done = start(tmp_path, *SMALL, *large, "optim=adamw")
    assert done.returncode == 71, done.stderr
    assert "does not fit: needs" in done.stderr
    report = result_of(tmp_path)["preflight"]
    assert report["hbm"]["total"] > report["hbm"]["capacity"]


def test_an_operation_without_a_lowering_ends_with_70_and_the_models_line(
    tmp_path: pathlib.Path,
) -> None:
    done = start(tmp_path, *SMALL, "job.entry=mine:Median")
    assert done.returncode == 70
    line = JOB.splitlines().index('        return model(batch["image"]).median()') + 1
    assert f"aten.median.default at {tmp_path}/mine.py:{line}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("hardware=cpu",), "hardware.name must be a TPU slice"),
        (("backend=lazy",), "backend.name must be openxla_step"),
        (("preflight.find=batchsize",), "'batch_size'"),
        (("hardware.devices=3",), "hardware.devices must be null"),
    ],
)
def test_a_setting_that_makes_no_sense_ends_with_64(
    tmp_path: pathlib.Path, arguments: tuple[str, ...], said: str
) -> None:
    done = start(tmp_path, *SMALL, *arguments)
    assert done.returncode == 64
    assert said in done.stderr


def test_several_side_by_side_all_answer(tmp_path: pathlib.Path) -> None:
    running = [
        subprocess.Popen(
            command(*SMALL, f"model.width={width}"),
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for width in (32, 48, 96)
    ]
    deadline = time.monotonic() + 200
    for process in running:
        _, errors = process.communicate(timeout=deadline - time.monotonic())
        assert process.returncode == 0, errors.decode()


def test_a_sweep_ends_with_a_table_and_goes_to_hparams(tmp_path: pathlib.Path) -> None:
    done = start(tmp_path, "-m", *SMALL, "hardware=v5e-1,v6e-1", "job.batch_size=64,128")
    assert done.returncode == 0, done.stderr
    assert "4 of 4 jobs fit" in done.stdout
    for heading in ("verdict", "memory of a chip", "roof ms", "MFU at most"):
        assert heading in done.stdout
