"""Commands on a run that exists: go on with it, export its weights."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

from runner.config.changes import check_unchanged
from runner.config.stored import changed_config, read_config
from runner.config.trust import trusted_packages
from runner.record.checkpoints import find_source
from runner.record.errors import ConfigError, ExitCode
from runner.record.outcome import State, result_from_json
from runner.record.rundir import RunDir


def run(name: str, argv: Sequence[str]) -> int:
    """Run the command `name`; returns the exit code.

    Raises:
        RunnerError: It cannot be done.
    """
    return _COMMANDS[name](argv)


def _resume(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="runner resume", description="Go on with a run from its newest checkpoint."
    )
    parser.add_argument("run", help="the run folder")
    parser.add_argument("overrides", nargs="*", help="key=value: more steps=, say")
    asked = _parsed(parser, argv)
    run_dir = RunDir(pathlib.Path(asked.run).absolute())
    if not run_dir.config.exists():
        raise ConfigError(f"resume needs a run folder with config.yaml; got {asked.run!r}")
    config, text = changed_config(run_dir.config, asked.overrides, trusted=trusted_packages())
    before = read_config(run_dir.config)
    check_unchanged(before, config, folder=run_dir.path)
    if _is_done(run_dir) and config == before:
        print(f"{asked.run} has succeeded: there is nothing left to do (steps= makes it longer)")
        return ExitCode.DONE
    # Imported late: it brings TensorBoard's writer, which a wrong key need not wait for.
    from runner.batch.supervise import RunPlan, supervise

    overrides = [*_lines(run_dir.overrides), *asked.overrides]
    plan = RunPlan(overrides=overrides, config_yaml=text, tensorboard_root=run_dir.path)
    code = supervise(config, run_dir, plan=plan).exit_code
    return ExitCode.BUG if code is None else code


def _is_done(run_dir: RunDir) -> bool:
    try:
        result = result_from_json(json.loads(run_dir.result.read_text()))
    except (OSError, ValueError):
        return False
    return result.state is State.SUCCEEDED


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _export(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="runner export",
        description="Write a run's weights as a plain state dict, in one safetensors file.",
    )
    parser.add_argument("run", help="a run folder, a checkpoint's folder, or a URL of either")
    parser.add_argument("--to", required=True, type=pathlib.Path, help="FILE.safetensors")
    parser.add_argument(
        "--strip", default="", metavar="PREFIX", help="a prefix that every key loses: 'model.'"
    )
    asked = _parsed(parser, argv)
    if asked.to.suffix != ".safetensors":
        raise ConfigError(f"--to must be a file that ends with .safetensors; got {str(asked.to)!r}")
    if not asked.to.absolute().parent.is_dir():
        raise ConfigError(f"--to must be in a folder that exists; got {str(asked.to)!r}")
    find_source(asked.run, key="export")
    request = json.dumps({"source": asked.run, "to": str(asked.to), "strip": asked.strip})
    # In a process of its own: this one never imports torch.
    return subprocess.run([sys.executable, "-m", "runner.train.export", request]).returncode


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return parser.parse_args(list(argv))
    except SystemExit as error:
        if not error.code:
            raise
        reason = complaint.getvalue().strip().rpartition("error: ")[2]
        raise ConfigError(f"{parser.prog}: {reason}; --help shows how") from None


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"resume": _resume, "export": _export}
NAMES = tuple(_COMMANDS)
