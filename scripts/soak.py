"""Kills a run at random instants and compares it with one that was left alone.

A run of `job=mlp` trains once undisturbed. Then it trains again while its worker, and now and
then the runner itself, is killed with signal 9 (or preempted, with --signal TERM) at random
instants: while it starts, between steps, in the middle of a save. A runner that was killed is
started again with `resume`. In the end the losses of all steps and the final state must equal,
with ==, those of the undisturbed run, and no checkpoint may have been found damaged.

With --devices 1,2,4 it is always the runner that is killed, and it goes on with one of these
numbers of devices each time: then losses and state must be equal within rounding.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from runner.record.errors import ExitCode
from runner.record.manifest import MANIFEST
from runner.record.rundir import RunDir
from runner.record.storage import LocalStorage

#: Of ten kills so many hit the runner itself, and so many a worker that has not stepped yet.
RUNNER_SHARE, EARLY_SHARE = 0.1, 0.2
#: Seconds after its start, or after a step, within which a worker is killed.
EARLY_S, JITTER_S = 5.0, 0.05
#: How far apart losses and states may be that other numbers of devices have come to.
ROUNDING = 1e-3
_POLL_S = 0.002


@dataclasses.dataclass
class Soak:
    """One run under fire.

    Attributes:
        folder: The run's folder.
        overrides: The run's configuration.
        kills: How often to kill.
        number: The signal.
        window: A worker that steps is killed within about so many steps.
        chance: Where the instants come from.
        devices: Numbers of devices to go on with; none leaves them as they are.
    """

    folder: pathlib.Path
    overrides: list[str]
    kills: int
    number: signal.Signals
    window: int
    chance: random.Random
    devices: Sequence[int] = ()
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def run(self) -> int:
        """Kill until it is enough, then let the run come to its end; returns its exit code."""
        process = start(self.overrides, self.folder)
        while True:
            while process.poll() is None and self._fired() < self.kills:
                self._kill_once(process)
                print(f"\r{self._fired()} of {self.kills} kills", end="", file=sys.stderr)
            code = process.wait()
            print(file=sys.stderr)
            if code not in (ExitCode.PREEMPTED, -signal.SIGKILL, -signal.SIGTERM):
                return code
            process = resume(self.folder, self._spread())

    def _spread(self) -> list[str]:
        """Overrides for one of the numbers of devices."""
        if not self.devices:
            return []
        count = self.chance.choice(self.devices)
        self.counts[f"went on with {count} devices"] += 1
        return spread(count)

    def _fired(self) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith("killed "))

    def _kill_once(self, process: subprocess.Popen[bytes]) -> None:
        worker = self._next_worker(process)
        if worker is None:
            return
        early = self.chance.random() < EARLY_SHARE
        if not early and not self._stepped(worker, self.chance.randrange(self.window)):
            return
        time.sleep(self.chance.uniform(0.0, EARLY_S if early else JITTER_S))
        saving = any(name.startswith(".writing") for name in self._storage().names())
        at_runner = bool(self.devices) or self.chance.random() < RUNNER_SHARE
        if process.poll() is not None or not _alive(worker):
            return
        if at_runner:
            process.send_signal(self.number)
            process.wait()
        else:
            os.kill(worker, self.number)
        _gone(worker)
        self.counts["killed the runner" if at_runner else "killed a worker"] += 1
        self.counts["of them before its first step"] += early
        self.counts["of them in the middle of a save"] += saving

    def _next_worker(self, process: subprocess.Popen[bytes]) -> int | None:
        """The process id of the runner's worker, once it has one."""
        while process.poll() is None:
            for child in _children(process.pid):
                if "runner.worker" in _command_line(child) and _alive(child):
                    return child
            time.sleep(_POLL_S)
        return None

    def _stepped(self, worker: int, steps: int) -> bool:
        """Wait until the worker has done so many steps; False if it ended before."""
        journal = RunDir(self.folder).metrics
        base = self._storage().steps()[:1]
        wanted = (base[0] if base else 0) + 1 + steps
        while _alive(worker):
            fresh = _started_worker(RunDir(self.folder)) == worker and journal.exists()
            if fresh and _last_step(journal) >= wanted:
                return True
            time.sleep(_POLL_S)
        return False

    def _storage(self) -> LocalStorage:
        return LocalStorage(RunDir(self.folder).checkpoints)


def _started_worker(run_dir: RunDir) -> int | None:
    """Process id of the worker that last had its device."""
    try:
        pid: int = json.loads(run_dir.environment.read_text())["device"]["pid"]
    except (OSError, ValueError, KeyError):
        return None
    return pid


def _last_step(journal: pathlib.Path) -> int:
    """The step of the journal's last whole line."""
    with open(journal, "rb") as file:
        file.seek(max(0, journal.stat().st_size - 4096))
        lines = file.read().rpartition(b"\n")[0].splitlines()
    return int(json.loads(lines[-1])["step"]) if len(lines) > 1 else 0


def _gone(worker: int) -> None:
    while _alive(worker):
        time.sleep(_POLL_S)


# Processes are known by their numbers alone: psutil also compares when they began, and where a
# machine's clock is set meanwhile it takes a process for another one.


def _children(parent: int) -> list[int]:
    try:
        tasks = list(pathlib.Path(f"/proc/{parent}/task").iterdir())
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:
        return []


def _command_line(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "runner", *argv]


def start(overrides: list[str], folder: pathlib.Path) -> subprocess.Popen[bytes]:
    return _started(command(*overrides, f"hydra.run.dir='{folder}'"), folder)


def resume(folder: pathlib.Path, changes: list[str]) -> subprocess.Popen[bytes]:
    return _started(command("resume", str(folder), *changes), folder)


def spread(devices: int) -> list[str]:
    return [f"parallel.name={'data' if devices > 1 else 'single'}", f"hardware.devices={devices}"]


def _started(argv: list[str], folder: pathlib.Path) -> subprocess.Popen[bytes]:
    with open(folder.with_suffix(".txt"), "ab") as output:
        return subprocess.Popen(argv, stdout=output, stderr=output)


def differences(whole: pathlib.Path, soaked: pathlib.Path, *, rounding: float) -> list[str]:
    """What differs between two runs that should be equal, up to `rounding` if it is not 0."""
    found = []
    one, other = (_losses(RunDir(folder)) for folder in (whole, soaked))
    if [step for step, _ in one] != [step for step, _ in other]:
        found.append(f"{len(one)} points, and {len(other)}, or other steps")
    elif one != other:
        apart = max(_apart(a, b) for (_, a), (_, b) in zip(one, other, strict=True))
        print(f"losses and metrics are up to {apart:.2e} apart")
        found += ["losses differ"] if not apart <= rounding else []
    storages = [LocalStorage(RunDir(folder).checkpoints) for folder in (whole, soaked)]
    names = [f"step-{storage.steps()[0]:08}" for storage in storages]
    files = [_files(storage, name) for storage, name in zip(storages, names, strict=True)]
    if rounding:
        apart = _states_apart(storages, names)
        print(f"final states are up to {apart:.2e} apart")
        found += ["final states differ"] if not apart <= rounding else []
    elif files[0] != files[1]:
        found.append(f"final states differ: {files[0]} and {files[1]}")
    damaged = [name for name in storages[1].names() if name.startswith("corrupt")]
    return [*found, *(f"{name} was found damaged" for name in damaged)]


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    if one.keys() != other.keys():
        return math.inf
    return max(abs(value - other[name]) for name, value in one.items())


def _states_apart(storages: Sequence[LocalStorage], names: Sequence[str]) -> float:
    from runner.train.checkpoint import load  # brings torch, which an exact comparison needs not

    one, other = (load(storage, name)[1] for storage, name in zip(storages, names, strict=True))
    if one.keys() != other.keys():
        return math.inf
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


def _losses(run_dir: RunDir) -> list[tuple[int, dict[str, float]]]:
    """Every point of the journal without its times: step, loss, rate, norm, metrics."""
    points = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    kept = ("train/", "eval/")
    return [(p["step"], {k: v for k, v in p.items() if k.startswith(kept)}) for p in points]


def _files(storage: LocalStorage, name: str) -> dict[str, str]:
    """SHA-256 of a checkpoint's files."""
    body = json.loads(storage.read(name, MANIFEST))["body"]
    return {file: entry["sha256"] for file, entry in body["files"].items()}


def main() -> int:
    """Run both and compare; 0 if they are equal."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--window", type=int, default=40, help="steps; see Soak")
    parser.add_argument("--steps-a-kill", type=int, default=150)
    parser.add_argument("--devices", default="", help="numbers of devices to go on with: 1,2,4")
    parser.add_argument("--folder", default=None, help="where to; default: a temporary folder")
    parser.add_argument("overrides", nargs="*", help="as for the runner")
    asked = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="runner soak ") as temporary:
        folder = pathlib.Path(asked.folder or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        overrides = [*DEFAULTS, f"steps={max(1, asked.kills) * asked.steps_a_kill}"]
        return soak(folder, [*overrides, *asked.overrides], asked)


ROOT = pathlib.Path(__file__).absolute().parents[1]
DEFAULTS = (
    "job=mlp",
    "hardware=cpu",
    "model.width=32",
    "model.depth=1",
    "model.dropout=0.1",
    "job.batch_size=32",
    "job.eval_batch_size=256",
    "checkpoint.every_steps=10",
    "checkpoint.every_s=null",
    "checkpoint.keep=3",
    "retries.failures=1000000",
    "retries.backoff_s=0",
)


def soak(folder: pathlib.Path, overrides: list[str], asked: argparse.Namespace) -> int:
    """Both runs, and what differs."""
    began = time.monotonic()
    whole, soaked = folder / "whole", folder / "soaked"
    if start(overrides, whole).wait() != 0:
        print(f"the undisturbed run failed; see {whole.with_suffix('.txt')}", file=sys.stderr)
        return 1
    number = signal.Signals[f"SIG{asked.signal}"]
    chance = random.Random(asked.seed)
    devices = [int(count) for count in asked.devices.split(",") if count]
    fire = Soak(soaked, overrides, asked.kills, number, asked.window, chance, devices)
    code = fire.run()
    result = json.loads(RunDir(soaked).result.read_text())
    for name, count in sorted(fire.counts.items()):
        print(f"{name}: {count}")
    print(f"attempts: {len(result['attempts'])}, steps: {result['steps']}, exit code {code}")
    print(f"lost steps: {sum(attempt['lost_steps'] for attempt in result['attempts'])}")
    rounding = ROUNDING if devices else 0.0
    found = [f"exit code {code}: {result['reason']}"]
    if code == 0:
        found = differences(whole, soaked, rounding=rounding)
    found += [f"only {fire._fired()} kills"] if fire._fired() < asked.kills else []
    equal = f"equal within {rounding:g}" if rounding else "equal"
    print("\n".join(found) or f"losses and final state are {equal}; no checkpoint was damaged")
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
