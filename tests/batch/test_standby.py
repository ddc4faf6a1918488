"""A worker that is made ready while the job before it still runs."""

from __future__ import annotations

import itertools
import os
import pathlib
import signal
import sys

import psutil
import pytest

from runner.batch import child as child_module
from runner.batch.child import Child
from runner.batch.standby import Standby
from tests.batch.runs import wait_until
from tests.batch.toys import Toys

_TWO_GRAPHS = ("job.batch_size=4,8", "seed=0,1", "backend.name=openxla_step")
#: Does nothing until it is dismissed.
_IDLER = "import sys\nfor line in sys.stdin:\n    pass\n"


@pytest.fixture
def toys(tmp_path: pathlib.Path) -> Toys:
    return Toys(tmp_path)


@pytest.fixture
def variables(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables of a worker that waits."""
    (tmp_path / "idler.py").write_text(_IDLER)
    monkeypatch.setattr(child_module, "WORKER", "idler")
    return {"PYTHONPATH": str(tmp_path)}


def _prepared(standby: Standby, variables: dict[str, str], *, load: bool = False) -> psutil.Process:
    before = set(psutil.Process().children())
    standby.prepare(variables, load=load)
    (process,) = set(psutil.Process().children()) - before
    return process


def _pid(child: Child) -> int:
    pid: int = child._process.pid
    return pid


def _end(child: Child) -> None:
    child.kill()
    child.dismiss(50)
    child.close()


def test_the_one_that_is_ready_is_taken_once(
    tmp_path: pathlib.Path, variables: dict[str, str]
) -> None:
    standby = Standby()
    ready = _prepared(standby, variables)
    standby.prepare(variables, load=False)  # there is one
    first, second = (standby.child(variables, tmp_path / "log.txt") for _ in range(2))
    assert _pid(first) == ready.pid != _pid(second)
    assert first.exit_code() is None
    _end(first)
    _end(second)


def test_one_with_other_variables_is_not_taken(
    tmp_path: pathlib.Path, variables: dict[str, str]
) -> None:
    standby = Standby()
    ready = _prepared(standby, variables)
    other = standby.child({**variables, "TPU_VISIBLE_CHIPS": "1"}, tmp_path / "log.txt")
    assert _pid(other) != ready.pid
    _end(other)
    again = _prepared(standby, {**variables, "TPU_VISIBLE_CHIPS": "1"})
    assert not ready.is_running()
    standby.dismiss()
    assert not again.is_running()


def test_a_dead_one_is_not_taken_and_nothing_is_left_open(
    tmp_path: pathlib.Path, variables: dict[str, str]
) -> None:
    before = os.listdir("/proc/self/fd")
    standby = Standby()
    ready = _prepared(standby, variables)
    ready.send_signal(signal.SIGKILL)
    wait_until(lambda: ready.status() == psutil.STATUS_ZOMBIE)
    child = standby.child(variables, tmp_path / "log.txt")
    assert _pid(child) != ready.pid
    _end(child)
    standby.dismiss()
    assert os.listdir("/proc/self/fd") == before


def test_one_that_cannot_be_started_is_no_loss(
    tmp_path: pathlib.Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    standby = Standby()
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", str(tmp_path / "nowhere"))
        standby.prepare(variables, load=False)
    child = standby.child(variables, tmp_path / "log.txt")
    assert child.exit_code() is None
    _end(child)


def test_one_that_has_loaded_its_libraries_is_for_jobs_that_want_them(
    tmp_path: pathlib.Path, variables: dict[str, str]
) -> None:
    standby, log = Standby(), tmp_path / "log.txt"
    ready = _prepared(standby, variables, load=True)
    plain = standby.child(variables, log)
    assert _pid(plain) != ready.pid
    taken = standby.child(variables, log, loaded=True)
    assert _pid(taken) == ready.pid
    bare = _prepared(standby, variables)
    standby.prepare(variables, load=True)  # the plain one will do
    again = standby.child(variables, log, loaded=True)
    assert _pid(again) == bare.pid
    for child in (plain, taken, again):
        _end(child)


def test_the_real_worker_loads_its_libraries_before_it_has_a_job() -> None:
    standby = Standby()
    ready = _prepared(standby, {"PJRT_DEVICE": "CPU"}, load=True)

    def is_loaded() -> bool:
        return any("_XLAC" in part.path for part in ready.memory_maps())

    wait_until(is_loaded, limit_s=120)
    standby.dismiss()
    assert not ready.is_running()


def _began_early(toys: Toys) -> list[bool]:
    """For each job, whether its process began before the job before it had ended."""
    begun = {line[0]: float(line[5]) for line in toys.written() if line[1] == "begin"}
    ended = {line[0]: float(line[4]) for line in toys.written() if line[1] == "end"}
    seeds = sorted(begun)
    return [begun[after] < ended[before] for before, after in itertools.pairwise(seeds)]


def _processes(toys: Toys) -> int:
    return len({line[3] for line in toys.written()})


def test_with_a_process_for_each_job_the_next_is_ready_when_one_ends(toys: Toys) -> None:
    done = toys.run("seed=range(4)", "batch.isolation=process", "model.step_s=0.2", "steps=5")
    assert done.returncode == 0, done.stderr
    assert _began_early(toys) == [True] * 3
    assert _processes(toys) == 4


@pytest.mark.parametrize(("isolation", "processes"), [("warm", 1), ("process", 2)])
def test_jobs_of_one_graph_need_none(toys: Toys, isolation: str, processes: int) -> None:
    settings = ("model.step_s=0.2", "steps=1000", f"batch.isolation={isolation}")
    with toys.start("seed=range(4)", "backend.name=openxla_step", *settings) as batch:
        wait_until(lambda: toys.count("begin").total() == 1)
        wait_until(lambda: len(psutil.Process(batch.pid).children()) == processes)


def test_a_job_of_another_graph_finds_its_process_ready(toys: Toys) -> None:
    done = toys.run(*_TWO_GRAPHS, "model.step_s=0.2", "steps=5")
    assert done.returncode == 0, done.stderr
    begun = [(line[3], float(line[5])) for line in toys.written() if line[1] == "begin"]
    ended = [float(line[4]) for line in toys.written() if line[1] == "end"]
    processes = [process for process, _ in begun]
    assert processes[0] == processes[1] != processes[2] == processes[3]
    assert ended[0] < begun[2][1] < ended[1], "made ready during the last job of the first graph"
