"""What a run's folder tells of it: earlier attempts, and whether it may go on as asked."""

from __future__ import annotations

import contextlib
import dataclasses
import json

from runner.config.changes import check_unchanged
from runner.config.schema import Config
from runner.config.stored import read_config
from runner.record.errors import ConfigError, ExitCode, Fault
from runner.record.outcome import Attempt, Result, State, result_from_json
from runner.record.rundir import RunDir
from runner.record.storage import Storage


def check_resumable(config: Config, run_dir: RunDir, storage: Storage) -> None:
    """A folder with checkpoints goes on with the configuration that it began with.

    Raises:
        ConfigError: It holds checkpoints of another configuration, or must hold none.
    """
    steps = storage.steps()
    if not steps:
        return
    if config.resume == "never":
        raise ConfigError(
            f"resume=never needs a folder without checkpoints: {run_dir.path} holds {len(steps)}; "
            "choose another folder (hydra.run.dir), or resume=auto to go on from them"
        )
    if run_dir.config.exists():
        check_unchanged(read_config(run_dir.config), config, folder=run_dir.path)


def earlier_result(run_dir: RunDir, storage: Storage) -> Result | None:
    """The result of the process that last ran in this folder, or None.

    If that process was killed, the attempt that it could not record is added.
    """
    try:
        result = result_from_json(json.loads(run_dir.result.read_text()))
    except (OSError, ValueError):
        return None
    if result.state is not State.RUNNING:
        return result
    lost_s = _unrecorded_s(run_dir)
    steps = max(result.steps, _last_logged_step(run_dir))
    saved = max(storage.steps(), default=0)
    attempt = Attempt(
        cause="the runner itself was ended without a word",
        exit_code=int(ExitCode.BUG),
        steps=steps,
        seconds=round(lost_s, 3),
        fault=Fault.INFRASTRUCTURE,
        first_step=-1,
        saved_step=saved,
        lost_steps=max(0, steps - saved),
    )
    goodput = dataclasses.replace(result.goodput, lost_s=result.goodput.lost_s + lost_s)
    return dataclasses.replace(result, goodput=goodput, attempts=[*result.attempts, attempt])


def evaluated_step(run_dir: RunDir) -> int:
    """The step of the newest evaluation that is recorded; 0 for none."""
    newest = 0
    broken = contextlib.suppress(OSError, ValueError, KeyError, TypeError)
    with broken, open(run_dir.metrics, "rb") as journal:
        for line in journal:
            if b'"eval/' in line and line.endswith(b"\n"):
                newest = int(json.loads(line)["step"])
    return newest


def _last_logged_step(run_dir: RunDir) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        lines = run_dir.metrics.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines[-2:] if line.endswith(b"\n")]
        return int(json.loads(whole[-1])["step"])
    return 0


def _unrecorded_s(run_dir: RunDir) -> float:
    """Seconds that a killed process worked after it last wrote its result."""
    with contextlib.suppress(OSError):
        written = run_dir.result.stat().st_mtime
        return max(0.0, run_dir.metrics.stat().st_mtime - written)
    return 0.0
