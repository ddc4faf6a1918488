"""A verdict is recalled while all that its program was made of is as it was, and only then."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]

#: Takes its width from a file, and its depth from a module that it imports.
JOB = """
import json, pathlib
from jobs.mlp import MLP
import helper

class Mine(MLP):
    def build(self):
        self.width = json.loads(pathlib.Path("width.json").read_text())
        self.depth = helper.DEPTH
        return super().build()
"""
#: As the worker does: ask what is remembered, else find out.
PROGRAM = """
import json, sys
from runner.preflight.recall import recalled
from runner.cli.app import conf_folder
from runner.config.compose import Composer

composer = Composer(conf_folder(), extra=None, trusted=frozenset({"jobs", "mine"}))
config = composer.config(sys.argv[1:])
report = recalled(config)
known = report is not None
light = "torch" not in sys.modules
if report is None:
    from tests.preflight.test_jobs import described
    import pathlib
    from runner.preflight.run import Preflight
    report = Preflight(described, lambda event: None, pathlib.Path(".")).judge(config)
print(json.dumps({"known": known, "light": light, "parameters": report.parameters}))
"""
COMMAND = ("mode=preflight", "job=mlp", "job.entry=mine:Mine", "hardware=v5e-1")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A job that was judged once."""
    folder = tmp_path / "a job"
    folder.mkdir()
    (folder / "mine.py").write_text(JOB)
    (folder / "helper.py").write_text("DEPTH = 1\n")
    (folder / "width.json").write_text("64")
    assert not asked(folder)["known"]
    return folder


def asked(folder: pathlib.Path, *overrides: str, **variables: str) -> dict[str, Any]:
    """What a process of its own says."""
    # Which test and part of it runs is in a variable, and a variable may be what a job reads.
    outside = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *COMMAND, *overrides],
        cwd=folder,
        env={
            **outside,
            "PYTHONPATH": f"{ROOT}:{folder}",
            "XDG_CACHE_HOME": str(folder.parent / "cache"),
            "PJRT_DEVICE": "CPU",
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_nothing_changed_and_nothing_is_traced(folder: pathlib.Path) -> None:
    first = asked(folder)
    assert first["known"]
    assert first["light"], "torch takes seconds to import"


def test_what_the_program_was_made_of_has_changed(folder: pathlib.Path) -> None:
    """A file that the job reads, a module that it imports, its own source, a variable."""
    before = asked(folder)["parameters"]

    (folder / "width.json").write_text("32 ")
    wide = asked(folder)
    assert not wide["known"]
    assert wide["parameters"] < before

    (folder / "helper.py").write_text("DEPTH = 2  # now\n")
    deep = asked(folder)
    assert not deep["known"]
    assert deep["parameters"] > wide["parameters"]

    (folder / "mine.py").write_text(JOB.replace("helper.DEPTH", "helper.DEPTH + 1"))
    deeper = asked(folder)
    assert not deeper["known"]
    assert deeper["parameters"] > deep["parameters"]

    assert asked(folder)["known"]
    assert not asked(folder, LIBTPU_INIT_ARGS="--xla_tpu_rwb_fusion=false")["known"]
    assert not asked(folder, "job.batch_size=8")["known"]


def test_a_search_a_dump_and_a_cache_that_is_not_wanted_are_no_recall(folder: pathlib.Path) -> None:
    from runner.cli.app import conf_folder
    from runner.config.compose import Composer
    from runner.preflight.recall import recalled

    composer = Composer(conf_folder(), extra=None, trusted=frozenset({"jobs"}))
    config = composer.config(["mode=preflight", "job=mlp", "hardware=v5e-1"])
    for changes in ({"cache": False}, {"dump": True}, {"find": "batch_size"}):
        preflight = dataclasses.replace(config.preflight, **changes)
        assert recalled(dataclasses.replace(config, preflight=preflight)) is None
