"""A storm of recompiles is counted, explained, limited, and refused where asked for."""

from __future__ import annotations

import pathlib

import pytest

from runner.record.errors import ExitCode
from runner.record.outcome import State
from tests.batch import runs

STORM = {"model__fault": "storm", "model__at": 1, "backend__name": "lazy"}


def test_a_storm_is_counted_and_explained_and_its_warnings_end(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result, _ = runs.run(tmp_path / "run", steps=13, **STORM)
    assert result.state is State.SUCCEEDED
    assert result.compile.recompiles == 12
    causes = [graph["cause"] for graph in result.compile.graphs if graph["recompile"]]
    assert len(causes) == 12
    assert all("a Python value in the model's code changed" in cause for cause in causes)
    said = capfd.readouterr().err
    assert said.count("warning: recompiled the step graph") == 10
    assert "10 recompiles so far; no warning follows for further ones" in said


def test_strict_ends_the_run_at_the_first_and_is_not_tried_again(tmp_path: pathlib.Path) -> None:
    result, _ = runs.run(tmp_path / "run", steps=13, strict=True, retries__failures=2, **STORM)
    assert (result.exit_code, result.state) == (ExitCode.BUG, State.FAILED)
    assert "strict allows no recompile after warm-up" in result.reason
    assert "the step graph was compiled again at step 1" in result.reason
    assert len(result.attempts) == 1
