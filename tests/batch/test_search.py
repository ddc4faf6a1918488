"""Searches by Optuna: trials on slots, pruning, the SQLite study, resume. No torch here."""

from __future__ import annotations

import json
import pathlib
import sqlite3
import subprocess
import sys
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from runner.config.search import Dimension, Space, space_of
from runner.record.errors import ConfigError
from tests.batch.runs import wait_until
from tests.batch.toys import ROOT, Toys

#: A loss that is least at 0.1, and a trial long enough to be stopped half-way.
SEARCH = (
    "hydra/sweeper=optuna",
    "optim.lr=tag(log, interval(0.001, 1))",
    "batch.metric=train/loss",
    "steps=20",
    "model.step_s=0.05",
    "hydra.sweeper.prune_startup_trials=2",
    "hydra.sweeper.startup_trials=4",
)


@pytest.fixture
def toys(tmp_path: pathlib.Path) -> Toys:
    return Toys(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """A search of ten trials on one slot that nothing disturbed."""
    made = Toys(tmp_path_factory.mktemp("whole search"))
    done = made.run(*SEARCH, "hydra.sweeper.n_trials=10")
    assert done.returncode == 0, done.stderr
    assert "of 10 jobs succeeded, " in done.stdout
    return made


def overrides(toys: Toys) -> list[str]:
    return [" ".join(job["overrides"]) for job in toys.jobs()]


def finals(toys: Toys) -> list[Any]:
    """What trials ended with; how far a pruned one still comes is chance."""
    return [job["final"] for job in toys.jobs() if job["state"] == "succeeded"]


def test_hopeless_trials_are_pruned_and_the_table_says_why(whole: Toys) -> None:
    states = whole.states()
    assert set(states) == {"succeeded", "pruned"}
    assert states[:2] == ["succeeded", "succeeded"], "nothing to compare with before"
    for job in whole.jobs():
        if job["state"] == "pruned":
            assert job["exit_code"] == 76
            assert job["reason"].startswith("pruned at step ")
            assert "worse than the median" in job["reason"]
            result = json.loads((whole.batch / job["folder"] / "result.json").read_text())
            assert (result["state"], result["exit_code"]) == ("pruned", 76)
            assert job["steps"] < 20
    listed = whole.command("ls", str(whole.batch)).stdout
    assert listed.count("pruned at step") == states.count("pruned")


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(whole: Toys, toys: Toys) -> None:
    arguments = (*SEARCH, "hydra.sweeper.n_trials=10", "resume=true")
    for begun in (1, 5):
        with toys.start(*arguments) as process:
            wait_until(lambda begun=begun: toys.count("begin").total() > begun)
            process.kill()
            process.wait(timeout=60)
    done = toys.command("resume", str(toys.batch))
    assert done.returncode == 0, done.stderr
    assert overrides(toys) == overrides(whole)
    assert toys.states() == whole.states()
    assert finals(toys) == finals(whole)


def test_more_trials_are_added_to_a_search_that_ended(toys: Toys) -> None:
    short = (*SEARCH, "hydra.sweeper.prune=false", "model.step_s=0")
    assert toys.run(*short, "hydra.sweeper.n_trials=3").returncode == 0
    first = overrides(toys)
    done = toys.run(*short, "hydra.sweeper.n_trials=6", "batch.max_concurrent=3", "resume=true")
    assert done.returncode == 0, done.stderr
    assert overrides(toys)[:3] == first
    assert toys.states() == ["succeeded"] * 6
    assert len({line[3] for line in toys.written()}) == 1 + 3, "three slots, a process each"
    with sqlite3.connect(toys.batch / "search.db") as study:
        trials = study.execute("SELECT number, state FROM trials ORDER BY number").fetchall()
    assert trials == [(number, "COMPLETE") for number in range(6)]


def test_what_goes_wrong_in_a_trial_is_a_row_and_the_search_goes_on(toys: Toys) -> None:
    done = toys.run(
        *SEARCH[:1],
        "job.batch_size=range(2, 9)",
        "accumulate_steps=2",
        "model.fault=choice(none, raise)",
        "batch.metric=eval/loss",
        "hydra.sweeper.n_trials=12",
    )
    assert done.returncode == 1
    assert "no trial will be pruned: eval/loss is reported at the end only" in done.stderr
    jobs = toys.jobs()
    assert len(jobs) == 12
    for job in jobs:
        odd = any(line in job["overrides"] for line in ("job.batch_size=3", "job.batch_size=5"))
        if odd:
            assert job["exit_code"] == 64
            assert "accumulate_steps must divide job.batch_size" in job["reason"]
    assert {job["exit_code"] for job in jobs} == {0, 64, 70}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=range(0,3)"], "batch.metric must be given"),
        (["batch.metric=train/loss"], "needs a key to search"),
        (["batch.metric=train/loss", "optim.lr=interval(-1,1)"], "optim.lr must be"),
        (["batch.metric=train/loss", "optim.lr=tag(lg,interval(0.1,1))"], "the only tag"),
        (["batch.metric=train/loss", "optim.lr=tag(log,interval(0,1))"], "begin above 0"),
        (["batch.metric=train/loss", "seed=1,2", "hydra.sweeper.n_trials=0"], "must be >= 1"),
        (["batch.metric=train/loss", "seed=1,2", "hydra.sweeper.n_jobs=2"], "n_jobs"),
        (["batch.metric=train/loss", "seed=1,2", "hydra/launcher=basic"], "hydra/launcher=runner"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(
    toys: Toys, arguments: list[str], said: str
) -> None:
    done = toys.run("hydra/sweeper=optuna", *arguments)
    assert done.returncode == 64, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not toys.batch.exists()


def test_a_metric_that_no_job_reports_ends_the_search(toys: Toys) -> None:
    done = toys.run("hydra/sweeper=optuna", "seed=range(9)", "batch.metric=eval/acuracy")
    assert done.returncode == 64
    assert "there are: eval/loss, train/loss, train/lr" in done.stdout
    assert "got 'eval/acuracy', which job 0 ended without" in done.stderr
    assert len(toys.jobs()) == 1


def test_another_search_in_the_same_folder_is_refused(toys: Toys) -> None:
    argv = ("hydra/sweeper=optuna", "batch.metric=train/loss", "hydra.sweeper.n_trials=1")
    assert toys.run(*argv, "seed=range(3)").returncode == 0
    for other in (["seed=range(4)"], ["seed=range(3)", "steps=4"]):
        done = toys.run(*argv, *other, "resume=true")
        assert done.returncode == 64
        assert "or choose another folder (batch.name)" in done.stderr


def test_a_dry_run_of_a_search_shows_the_space(toys: Toys) -> None:
    done = toys.run(*SEARCH, "seed=int(interval(1,4))", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "optim.lr: numbers 0.001 to 1, log" in done.stdout
    assert "seed: whole numbers 1 to 4" in done.stdout
    assert not toys.batch.exists()


def _space(*lines: str) -> Space:
    return space_of(OverridesParser.create().parse_overrides([*lines]))


@pytest.mark.parametrize(
    ("line", "dimension"),
    [
        ("x=interval(-5.5, 5)", Dimension("x", low=-5.5, high=5.0)),
        ("x=interval(1, 4)", Dimension("x", low=1.0, high=4.0)),
        ("x=int(interval(1, 4))", Dimension("x", low=1, high=4, whole=True, step=1)),
        ("x=tag(log, interval(1e-4, 1))", Dimension("x", low=1e-4, high=1.0, log=True)),
        ("x=range(1, 9)", Dimension("x", low=1, high=8, whole=True, step=1.0)),
        ("x=range(9, 1, -4)", Dimension("x", low=5, high=9, whole=True, step=4.0)),
        ("x=range(0, 1, 0.25)", Dimension("x", low=0.0, high=0.75, step=0.25)),
        ("x=choice(a, 'b c', 3)", Dimension("x", choices=("a", "b\\ c", "3"))),
        ("x=a,b,a", Dimension("x", choices=("a", "b"))),
        ("+x.y=[1,2],[3]", Dimension("+x.y", choices=("[1,2]", "[3]"))),
    ],
)
def test_a_space_is_written_as_for_hydras_own_plugin(line: str, dimension: Dimension) -> None:
    assert _space("seed=3", line) == Space(("seed=3",), (dimension,))


@pytest.mark.parametrize("line", ["x=interval(2,1)", "x=range(3,3)", "x=interval(0,1),5"])
def test_a_space_without_values_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match="x="):
        _space(line)


def test_nothing_but_a_search_imports_optuna(toys: Toys) -> None:
    program = (
        "import sys; from runner.__main__ import main; main(); "
        "print('LOADED', sorted({'optuna', 'ray'} & set(sys.modules)))"
    )
    for argv in (["--help"], ["-m", "job=mlp", "seed=0,1", "dry_run=true"]):
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [sys.executable, "-c", program, *argv],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "LOADED []" in done.stdout, done.stderr


def test_values_survive_the_way_through_an_override() -> None:
    values: dict[str, Any] = {"x": 1.2345678901234567e-05, "y": "b\\ c", "z": 7}
    space = Space(("a=1",), tuple(Dimension(key) for key in values))
    lines = space.lines(values)
    parsed = OverridesParser.create().parse_overrides(lines)
    assert [item.value() for item in parsed] == [1, 1.2345678901234567e-05, "b c", 7]
