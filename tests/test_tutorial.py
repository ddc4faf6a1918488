"""The README's tutorial: its commands, in their order, each as a reader would start it."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]
#: Words of commands that cannot be run to their end without what they ask for -> what is missing;
#: here they must end with 71 and say so.
CANNOT_RUN_HERE: Mapping[str, str] = {"hardware=tpu": "hardware=tpu needs a TPU"}


def tutorial() -> list[list[str]]:
    """The words of each command of the section, without the interpreter."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Tutorial\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^    (.+)$", section, re.MULTILINE)
    prefix = "python -m runner "
    assert all(line.startswith(prefix) for line in lines), lines
    return [line.removeprefix(prefix).split() for line in lines]


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "runner", *words]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


def serves(folder: pathlib.Path, words: list[str], environment: dict[str, str]) -> None:
    """Start TensorBoard, load its page and press Ctrl-C."""
    with subprocess.Popen(
        command(words),
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as served:
        assert served.stderr is not None
        try:
            found = (re.search(r"http://localhost:\d+/", line) for line in served.stderr)
            address = next(match.group() for match in found if match)
            with urllib.request.urlopen(address) as page:
                assert b"TensorBoard" in page.read()
        finally:
            served.send_signal(signal.SIGINT)
        served.stderr.read()
    assert served.returncode in (0, 130)


def test_every_command_runs_in_the_order_of_the_tutorial(
    tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    for words in tutorial():
        if words == ["tensorboard"]:
            serves(tmp_path, words, environment)
            continue
        done = subprocess.run(
            command(words), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        missing = [reason for word, reason in CANNOT_RUN_HERE.items() if word in words]
        if missing:
            assert done.returncode == 71, done.stderr
            assert missing[0] in done.stderr
        else:
            assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    assert (tmp_path / "multirun" / "rates" / "report.html").exists()
    for batch, jobs in (("rates", 3), ("far", 2)):
        results = (tmp_path / "multirun" / batch).glob("*-mlp/result.json")
        states = [json.loads(path.read_text())["state"] for path in results]
        assert states == ["succeeded"] * jobs


def test_the_tutorial_goes_from_a_first_run_to_a_cluster() -> None:
    stages = ("steps=60", "tensorboard", "-m", "mode=preflight", "hardware=tpu")
    commands = tutorial()
    first = [next(n for n, words in enumerate(commands) if stage in words) for stage in stages]
    assert first == sorted(first)
    assert "hydra/launcher=ray" in commands[-1]
