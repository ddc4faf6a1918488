"""Commands on a run that exists, at the process's boundary: resume and export."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision

from runner.record.manifest import folder_name

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
    "job=mlp",
    "backend=eager",
    "hardware=cpu",
    "job.batch_size=16",
    "model.width=16",
    "model.dropout=0.2",
    "steps=6",
    "checkpoint.every_steps=2",
)


def runner(cwd: pathlib.Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner", *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of six steps to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    done = runner(folder, *SMALL, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def cut(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The run as it was when the machine went away after step 5."""
    run = tmp_path / "a run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / folder_name(6))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]))
    result = json.loads((run / "result.json").read_text())
    result.update(state="running", exit_code=None, steps=4, attempts=[])
    (run / "result.json").write_text(json.dumps(result))
    return run


def points(run: pathlib.Path) -> list[dict[str, Any]]:
    """The journal without times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = ("train/", "eval/")
    return [
        {"step": line["step"], **{k: v for k, v in line.items() if k.startswith(wanted)}}
        for line in found
    ]


def test_resume_goes_on_where_the_checkpoint_is(whole: pathlib.Path, cut: pathlib.Path) -> None:
    done = runner(cut.parent, "resume", "a run")
    assert done.returncode == 0, done.stderr
    assert "from step 4" in done.stderr
    assert points(cut) == points(whole)
    result = json.loads((cut / "result.json").read_text())
    killed, last = result["attempts"]
    assert (killed["steps"], killed["lost_steps"]) == (5, 1)
    assert (last["first_step"], last["steps"]) == (4, 6)


def test_a_run_that_has_succeeded_is_left_alone(whole: pathlib.Path) -> None:
    before = (whole / "result.json").read_bytes()
    done = runner(whole.parent, "resume", "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing left to do" in done.stdout
    assert (whole / "result.json").read_bytes() == before


def test_checkpoints_behind_a_url_are_found_again(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    root = f"checkpoint.root=local://{tmp_path}/bucket"
    argv = (*SMALL, root, "hydra.run.dir=outputs/run")
    done = runner(tmp_path, *argv)
    assert done.returncode == 0, done.stderr
    bucket = tmp_path / "bucket" / "outputs" / "run"
    assert sorted(path.name for path in bucket.iterdir()) == [folder_name(4), folder_name(6)]
    shutil.rmtree(bucket / folder_name(6))
    done = runner(tmp_path, *argv)
    assert done.returncode == 0, done.stderr
    assert "from step 4" in done.stderr
    assert points(tmp_path / "outputs" / "run") == points(whole)
    done = runner(tmp_path, "export", "outputs/run", "--to", "model.safetensors")
    assert done.returncode == 0, done.stderr


def test_resume_takes_free_keys_and_refuses_the_others(cut: pathlib.Path) -> None:
    refused = runner(cut.parent, "resume", "a run", "optim.lr=0.5", "seed=3", "steps=8")
    assert refused.returncode == 64
    assert "optim.lr: 0.02 -> 0.5" in refused.stderr
    assert "seed: 0 -> 3" in refused.stderr
    assert "steps" not in refused.stderr
    done = runner(cut.parent, "resume", "a run", "steps=8", "log_every=2")
    assert done.returncode == 0, done.stderr
    assert [point["step"] for point in points(cut)] == [1, 2, 3, 4, 6, 8, 8]
    assert "steps: 8" in (cut / "config.yaml").read_text()
    assert (cut / "overrides.txt").read_text().splitlines()[-2:] == ["steps=8", "log_every=2"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["resume"], "resume: the following arguments are required: run"),
        (["resume", "nowhere"], "resume needs a run folder with config.yaml; got 'nowhere'"),
        (["resume", "a run", "stepz=3"], "stepz"),
        (["resume", "a run", "steps=1,2"], "one value a key"),
        (["resume", "a run", "steps=0"], "steps must be >= 1"),
        (["export", "a run", "--to", "weights.pt"], "ends with .safetensors"),
        (["export", "a run", "--to", "no/such/w.safetensors"], "folder that exists"),
        (["export", "nowhere", "--to", "w.safetensors"], "holds no checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_with_64_and_one_message(
    cut: pathlib.Path, argv: list[str], said: str
) -> None:
    done = runner(cut.parent, *argv)
    assert done.returncode == 64, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_command_in_the_same_folder_goes_on(cut: pathlib.Path) -> None:
    done = runner(cut.parent, *SMALL, "hydra.run.dir='a run'")
    assert done.returncode == 0, done.stderr
    assert "from step 4" in done.stderr
    refused = runner(cut.parent, *SMALL, "hydra.run.dir='a run'", "resume=never")
    assert refused.returncode == 64
    assert "resume=never needs a folder without checkpoints" in refused.stderr


def test_a_new_run_goes_on_from_an_old_one(whole: pathlib.Path, cut: pathlib.Path) -> None:
    done = runner(cut.parent, *SMALL, "hydra.run.dir=new", f"resume='{cut}'")
    assert done.returncode == 0, done.stderr
    assert points(cut.parent / "new") == points(whole)[4:]


def test_a_new_run_takes_the_weights_alone(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    evaluate = ("mode=evaluate", "hydra.run.dir=judged", f"init_from={whole}")
    done = runner(tmp_path, *SMALL, *evaluate)
    assert done.returncode == 0, done.stderr
    (judged,) = points(tmp_path / "judged")
    assert judged == {**points(whole)[-1], "step": 0}


def test_export_gives_a_plain_state_dict(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = runner(tmp_path, "export", str(whole), "--to", "model.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "the weights after step 6" in done.stdout
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    stored = safetensors.torch.load_file(
        whole / "checkpoints" / folder_name(6) / "model-00000.safetensors"
    )
    assert {f"params/{name}" for name in state} == set(stored)
    assert all(torch.equal(tensor, stored[f"params/{name}"]) for name, tensor in state.items())
    damaged = whole / "checkpoints" / folder_name(6) / "model-00000.safetensors"
    content = damaged.read_bytes()
    try:
        damaged.write_bytes(content[:-1])
        failed = runner(tmp_path, "export", str(whole), "--to", "again.safetensors")
    finally:
        damaged.write_bytes(content)
    assert failed.returncode == 73
    assert "model-00000.safetensors must have" in failed.stderr
    assert not (tmp_path / "again.safetensors").exists()


def test_torchvision_loads_an_exported_resnet(tmp_path: pathlib.Path) -> None:
    argv = ("job=resnet", "backend=eager", "model.stem=imagenet", "steps=1", "job.batch_size=2")
    more = ("data=synthetic", "data.options.examples=2", "data.options.image_size=32")
    done = runner(tmp_path, *argv, *more, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    done = runner(tmp_path, "export", "run", "--to", "resnet18.safetensors")
    assert done.returncode == 0, done.stderr
    state = safetensors.torch.load_file(tmp_path / "resnet18.safetensors")
    model = torchvision.models.resnet18(num_classes=state["fc.bias"].numel())
    model.load_state_dict(state, strict=True)
    assert int(state["bn1.num_batches_tracked"]) == 1
