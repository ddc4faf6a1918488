"""Memory that runs out, on the device or on the host, is named with sizes."""

from __future__ import annotations

import pathlib

import pytest

from runner.record.errors import ExitCode
from runner.record.outcome import State
from tests.batch import runs


@pytest.mark.parametrize("backend", ["openxla_step", "lazy"])
def test_a_job_that_the_device_cannot_hold_is_told_so_and_not_tried_again(
    tmp_path: pathlib.Path, backend: str
) -> None:
    result, run_dir = runs.run(
        tmp_path / "run",
        model__fault="device_memory",
        model__at=1,
        backend__name=backend,
        retries__failures=2,
        retries__infrastructure=2,
    )
    assert (result.exit_code, result.state) == (ExitCode.DEVICE, State.FAILED)
    assert "out of device memory" in result.reason
    assert "bytes" in result.reason
    assert "the training state takes 0.00 GB" in result.reason
    assert "Smaller job.batch_size" in result.reason
    assert len(result.attempts) == 1
    assert "Out of memory" in run_dir.log.read_text()
