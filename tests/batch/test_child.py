"""A worker's process as its parent sees it: its start, its end, and what is left open."""

from __future__ import annotations

import os
import pathlib
import time

import pytest

from runner.batch import child as child_module
from runner.batch.child import Child, start_child
from tests.batch.runs import wait_until

#: Leaves a process behind that has the pipe of events.
_LEAVER = """\
import subprocess, sys
subprocess.Popen(["sleep", "60"], pass_fds=[int(sys.argv[1])])
"""


@pytest.fixture
def leaver(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables with which a worker ends at once, but not all that it started."""
    (tmp_path / "leaver.py").write_text(_LEAVER)
    monkeypatch.setattr(child_module, "WORKER", "leaver")
    return {"PYTHONPATH": str(tmp_path)}


def test_an_end_is_seen_though_another_process_holds_the_pipe(
    tmp_path: pathlib.Path, leaver: dict[str, str]
) -> None:
    child = start_child({}, leaver, tmp_path / "log.txt")
    start = time.monotonic()
    child.wait(50)
    assert time.monotonic() - start < 40
    wait_until(lambda: child.exit_code() == 0)
    child.kill()
    child.close()


def test_a_worker_leaves_no_descriptor_open(tmp_path: pathlib.Path, leaver: dict[str, str]) -> None:
    before = os.listdir("/proc/self/fd")
    child = start_child({}, leaver, tmp_path / "log.txt")
    child.dismiss(50)
    child.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_worker_that_cannot_be_started_leaves_no_descriptor_open(tmp_path: pathlib.Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        Child(environment={}, log=tmp_path / "nowhere" / "log.txt")
    assert os.listdir("/proc/self/fd") == before
