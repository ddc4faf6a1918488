"""Commands on a run that exists: go on with it, export its weights."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

from runner.batch.ledger import FILE_NAME, read_ledger
from runner.cli.words import folder_override
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
        prog="runner resume",
        description="Go on with a run from its newest checkpoint, or with what a batch has left.",
    )
    parser.add_argument("run", help="the folder of a run or of a batch")
    parser.add_argument("overrides", nargs="*", help="key=value: more steps=, say")
    asked = _parsed(parser, argv)
    run_dir = RunDir(pathlib.Path(asked.run).absolute())
    if (run_dir.path / FILE_NAME).exists():
        return _resume_batch(run_dir.path, asked.overrides)
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


def _resume_batch(folder: pathlib.Path, overrides: Sequence[str]) -> int:
    """The command that began a batch, once more, in the same folders."""
    from runner.cli import app

    command = read_ledger(folder)[1]
    try:
        os.chdir(command.cwd)
    except OSError as error:
        raise ConfigError(
            f"the batch in {folder} was started in {command.cwd}, which must still be there: "
            f"its configuration may name files by relative paths ({error})"
        ) from error
    flags = [f"--config-dir={command.config_dir}"] if command.config_dir else []
    again = [*command.overrides, *overrides, folder_override(folder), "batch.resume=true"]
    return app.run(["-m", *flags, *again])


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


def _ls(argv: Sequence[str]) -> int:
    from runner.cli import look  # numpy, rich: no other command needs them

    parser = argparse.ArgumentParser(prog="runner ls", description="List runs and batches.")
    look.add_ls(parser)
    return look.ls(_parsed(parser, argv))


def _report(argv: Sequence[str]) -> int:
    from runner.cli import look  # as in _ls

    parser = argparse.ArgumentParser(
        prog="runner report", description="Write one HTML file about runs that opens offline."
    )
    look.add_report(parser)
    return look.report(_parsed(parser, argv))


def _explain(argv: Sequence[str]) -> int:
    from runner.cli.explain import explain  # as in _ls

    parser = argparse.ArgumentParser(
        prog="runner explain",
        description="Print the ten dearest operations of a run's training step, each with the "
        "module of the model that it comes from: measured, from a profile (profile.steps), or "
        "estimated by the TPU compiler (mode=preflight).",
    )
    parser.add_argument("run", help="a run folder")
    return explain(_parsed(parser, argv).run)


def _tensorboard(argv: Sequence[str]) -> int:
    from runner.cli import tensorboard  # as in _ls

    parser = argparse.ArgumentParser(
        prog="runner tensorboard", description="Start TensorBoard on localhost."
    )
    tensorboard.add_tensorboard(parser)
    return tensorboard.tensorboard(_parsed(parser, argv))


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "resume": _resume,
    "export": _export,
    "ls": _ls,
    "report": _report,
    "explain": _explain,
    "tensorboard": _tensorboard,
}
NAMES = tuple(_COMMANDS)
