"""A worker without torch, for batches of hundreds of jobs: it speaks the real protocol.

What it does is in the job's `model` section: `fault`, `step_s`, and for every job a line in the
file `diary` when it begins and when it ends, with the chips that it sees and when its process
began.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sys
import time
from typing import Any

from runner.record.errors import Fault
from runner.record.events import Ended, Evaluated, Phase, Planned, Started, StepRecord, Steps
from runner.record.pipe import EventWriter


def main(arguments: list[str]) -> int:
    events = EventWriter(int(arguments[0]))
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("log"):
            with open(request["log"], "ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
        ended = _run(request["config"], events)
        events.send(ended)
        if ended.exit_code:
            return ended.exit_code
    return 0


def _run(config: dict[str, Any], events: EventWriter) -> Ended:
    toy = config["model"]
    events.send(Started(os.getpid(), "toy", 1, {}))
    events.send(Planned(config["steps"], 1, 1, 1, 0, None))
    _take_chips(toy, config)
    _write(toy, config, "begin")
    try:
        _train(config, events)
    except InterruptedError as stopped:
        code = 75 if stopped.errno == signal.SIGTERM else 130
        fault = Fault.PREEMPTION if code == 75 else Fault.FINAL
        return Ended(code, "stopped", 0, fault.value)
    _write(toy, config, "end")
    return Ended(0, "", config["steps"])


def _take_chips(toy: dict[str, Any], config: dict[str, Any]) -> None:
    """Lock the chips as long as this process lives, and note it if another has one."""
    for chip in os.environ.get("TPU_VISIBLE_CHIPS", "").split(","):
        if chip and chip not in _chips:
            _chips[chip] = os.open(f"{toy['diary']}.chip{chip}", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(_chips[chip], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _write(toy, config, "clash")


def _train(config: dict[str, Any], events: EventWriter) -> None:
    toy = config["model"]
    events.send(Phase("training"))
    for step in range(1, config["steps"] + 1):
        _sleep(toy["step_s"])
        if step == toy["at"]:
            _go_wrong(toy["fault"], config, events)
        record = StepRecord(step, 1.0, 1.0, 0.0, 1.0, False)
        events.send(Steps([record], {"loss": _loss(config, step), "lr": 0.1}, 0, 0.0, 1, 1, 1))
    metrics = {"loss": _loss(config, config["steps"])}
    events.send(Evaluated(config["steps"], metrics, examples=1, seconds=0.0))


def _loss(config: dict[str, Any], step: int) -> float:
    """Smaller for more steps and for a rate near 0.1."""
    return float(1.0 / step + abs(config["optim"]["lr"] - 0.1))


def _go_wrong(fault: str, config: dict[str, Any], events: EventWriter) -> None:
    dice = random.Random(time.monotonic_ns())
    if fault == "random":
        fault = dice.choice(["none"] * 4 + ["kill", "exit", "raise"])
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        os._exit(3)
    if fault == "raise":
        events.send(Ended(70, "RuntimeError: the job's own error", 0, Fault.FAILURE.value))
        sys.exit(70)
    if fault == "infinite":
        events.send(Ended(72, "the loss must be a finite number", 0, Fault.FINAL.value))
        sys.exit(72)
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)


def _write(toy: dict[str, Any], config: dict[str, Any], what: str) -> None:
    chips = os.environ.get("TPU_VISIBLE_CHIPS", "-")
    line = f"{config['seed']} {what} {chips} {os.getpid()} {time.monotonic()} {_BORN}\n"
    with open(toy["diary"], "ab", buffering=0) as diary:
        diary.write(line.encode())


def _sleep(seconds: float) -> None:
    if seconds:
        time.sleep(seconds)
    if _caught:
        raise InterruptedError(_caught[0], "stopped")


_BORN = time.monotonic()
_caught: list[int] = []
_chips: dict[str, int] = {}


def _on_signal(number: int, frame: object) -> None:
    _caught.append(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
