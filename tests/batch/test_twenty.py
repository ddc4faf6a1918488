"""Twenty jobs of which six die, each in a way of its own; real workers, on two slots."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.batch.toys import ROOT

#: How a job dies: exit code and what the table says of it.
DEATHS = {
    "raise": (70, "RuntimeError: the job's own error"),
    "exit": (70, "exit code 3"),
    "kill": (70, "killed by SIGKILL"),
    "hang": (74, "hang: no sign of life"),
    "starve": (71, "out of host memory: the kernel killed the worker"),
    "nan": (72, "finite"),
}
_JOB = """\
# @package _global_
job: {name: line, entry: "tests.faulty:Faulty", batch_size: 8}
data: {name: numbers, entry: "tests.faulty:numbers", options: {broken_from: null}}
backend: {name: eager}
steps: 6
model: {fault: none, at: 3, step_s: 0.0, times: null, memory: null}
hardware: {name: cpu}
retries: {failures: 0, backoff_s: 0.0}
timeouts: {step_s: 4.0}
"""


def test_six_of_twenty_jobs_die_and_the_others_succeed(tmp_path: pathlib.Path) -> None:
    group = pathlib.Path("/sys/fs/cgroup/memory/runner-test-twenty")
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(700 << 20))
    except OSError:
        pytest.skip("no memory control group can be made here")
    (tmp_path / "conf" / "job").mkdir(parents=True)
    (tmp_path / "conf" / "job" / "line.yaml").write_text(_JOB)
    faults = [word for fault in DEATHS for word in ("none", "none", fault)] + ["none"] * 2
    listed = ",".join(repr(fault) for fault in faults)  # nan alone is a number
    arguments = [f"model.fault={listed}", "batch.name=b", "batch.max_concurrent=2"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "runner", "--config-dir=conf", "-m", "job=line", *arguments],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "RUNNER_TRUST": "tests",
                "TEST_MEMORY_GROUP": str(group),
            },
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    finally:
        group.rmdir()
    assert done.returncode == 1, done.stderr
    assert "14 of 20 jobs succeeded" in done.stdout
    jobs = json.loads((tmp_path / "multirun" / "b" / "sweep.json").read_text())["jobs"]
    assert len(jobs) == 20
    for job, fault in zip(jobs, faults, strict=True):
        code, said = DEATHS.get(fault, (0, ""))
        assert (job["exit_code"], job["state"] == "succeeded") == (code, code == 0), job
        assert said in job["reason"]
        assert said.split(":")[0] in " ".join(done.stdout.split())
