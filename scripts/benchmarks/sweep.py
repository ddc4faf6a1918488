"""What the launcher of batches saves, and what it costs.

Shared compiles: twelve ResNet jobs that differ in learning rate and seed, once with warm
processes and once with a process each (`batch.isolation=process`), in turns; their walls' ratio
and the number of compiles. Overhead: 200 jobs that do nothing against 200 of their processes
alone; and how much the parent's memory grows with further jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
RATIO_TARGET, OVERHEAD_TARGET_S, JOB_TARGET_BYTES = 0.5, 2.0, 32_000
#: Batches of jobs that do nothing, each followed by its processes alone.
TURNS = 3
JOBS = ("optim.lr=0.02,0.05,0.1,0.2", "seed=0,1,2")
#: Puts the worker that does nothing in the place of the real one.
IDLE = """\
import resource, sys
import runner.batch.child as child
child.WORKER = "contest.noop_worker"
from runner.__main__ import main
code = main()
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""


def main() -> int:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="bench sweep", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="of the ResNet jobs; 0 leaves it")
    parser.add_argument("--steps", type=int, default=10, help="updates of a ResNet job")
    parser.add_argument("--jobs", type=int, default=200, help="jobs that do nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    if asked.rounds:
        figures |= shared(rounds=asked.rounds, steps=asked.steps)
    if asked.jobs:
        figures |= overhead(asked.jobs)
    figures["met"] = met(figures)
    print(json.dumps(figures, indent=2) if asked.json else table(figures))
    return 0 if all(figures["met"].values()) else 1


def met(figures: dict[str, Any]) -> dict[str, bool]:
    """Which targets were met."""
    judged = {}
    if "ratio" in figures:
        judged[f"ratio at most {RATIO_TARGET}"] = figures["ratio"] <= RATIO_TARGET
        judged["one compile of the step"] = figures["warm_step_compiles"] == 1
    if "overhead_s" in figures:
        judged[f"overhead at most {OVERHEAD_TARGET_S} s"] = (
            figures["overhead_s"] <= OVERHEAD_TARGET_S
        )
        judged[f"at most {JOB_TARGET_BYTES} bytes a job"] = (
            figures["bytes_a_job"] <= JOB_TARGET_BYTES
        )
    return judged


def table(figures: dict[str, Any]) -> str:
    """The figures, a line each."""
    lines = [f"{name:28} {value}" for name, value in figures.items() if name != "met"]
    lines += [f"{'met' if good else 'MISSED'}: {what}" for what, good in figures["met"].items()]
    return "\n".join(lines)


def shared(*, rounds: int, steps: int) -> dict[str, Any]:
    """Walls of the ResNet jobs with warm processes and with a process each."""
    walls: dict[str, list[float]] = {"warm": [], "process": []}
    compiles: dict[str, int] = {}
    for number in range(rounds):
        for isolation in walls:
            with tempfile.TemporaryDirectory() as folder:
                argv = [sys.executable, "-m", "runner", "-m", "job=resnet", "hardware=cpu", *JOBS]
                settings = [f"steps={steps}", f"batch.isolation={isolation}", "batch.name=b"]
                wall_s, _ = _timed([*argv, *settings], folder)
                walls[isolation].append(wall_s)
                compiles[isolation] = _step_compiles(pathlib.Path(folder) / "multirun" / "b")
            print(f"round {number}: {isolation} {wall_s:.1f} s", file=sys.stderr, flush=True)
    pairs = zip(walls["warm"], walls["process"], strict=True)
    return {
        "warm_s": walls["warm"],
        "process_s": walls["process"],
        "ratio": statistics.median(warm / process for warm, process in pairs),
        "warm_step_compiles": compiles["warm"],
        "process_step_compiles": compiles["process"],
    }


def _step_compiles(batch: pathlib.Path) -> int:
    """How often XLA compiled a training step: records of graphs that took it no time are reuses."""
    results = [json.loads(path.read_text()) for path in batch.glob("*/result.json")]
    assert len(results) == 12, "every job leaves a result"
    assert all(result["state"] == "succeeded" for result in results)
    graphs = [graph for result in results for graph in result["compile"]["graphs"]]
    return sum(graph["role"] == "step" and graph["xla_s"] > 0 for graph in graphs)


def overhead(jobs: int) -> dict[str, Any]:
    """The launcher's own seconds for jobs that do nothing, and bytes of each in the parent."""
    walls, processes = [], []
    for number in range(TURNS):
        with tempfile.TemporaryDirectory() as folder:
            walls.append(_timed(_idle_batch(jobs, "process"), folder)[0])
        processes.append(_processes_s(jobs))
        said = f"{jobs} jobs {walls[-1]:.2f} s, their processes {processes[-1]:.2f} s"
        print(f"turn {number}: {said}", file=sys.stderr, flush=True)
    peaks = []
    for count in (jobs, 5 * jobs):
        with tempfile.TemporaryDirectory() as folder:
            _, said = _timed(_idle_batch(count, "warm"), folder)
        peaks.append(int(said.rpartition("peak ")[2]))
    return {
        "jobs": jobs,
        "wall_s": walls,
        "processes_s": processes,
        "overhead_s": statistics.median(walls) - statistics.median(processes),
        "bytes_a_job": (peaks[1] - peaks[0]) / (4 * jobs),
    }


def _idle_batch(jobs: int, isolation: str) -> list[str]:
    settings = [f"seed=range({jobs})", f"batch.isolation={isolation}", "batch.name=b"]
    return [sys.executable, "-c", IDLE, "-m", "job=mlp", "hardware=cpu", *settings]


def _processes_s(jobs: int) -> float:
    """Seconds that the processes of the jobs take, one after another."""
    request = json.dumps({"config": {"steps": 1}}).encode()
    argv = [sys.executable, "-m", "contest.noop_worker", "1", "0"]
    environment, start = _environment(), time.monotonic()
    for _ in range(jobs):
        subprocess.run(argv, input=request, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - start


def _timed(argv: list[str], folder: str) -> tuple[float, str]:
    """Seconds that a command takes, and what it said."""
    start = time.monotonic()
    done = subprocess.run(
        argv, cwd=folder, env=_environment(), capture_output=True, text=True, check=False
    )
    wall_s = time.monotonic() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stderr}")
    return wall_s, done.stderr


def _environment() -> dict[str, str]:
    path = [str(ROOT), str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "TERM": "dumb"}


if __name__ == "__main__":
    sys.exit(main())
