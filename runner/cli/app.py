"""From argv to an exit code: read the arguments, check the configuration, hand over to Hydra.

Every mistake of the user ends here with one message on stderr and exit code 64. What a run
does is `runner.batch`'s; what Hydra does with a configuration stays Hydra's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import hydra

import runner
from runner.cli import arguments, commands
from runner.cli.arguments import Arguments
from runner.cli.batch import BatchPlan, plan_batch, show_plan
from runner.cli.help import help_text, no_job_text
from runner.cli.plugins import register
from runner.cli.runs import Asked, HydraTask, Runs
from runner.cli.words import batch_words, command_of, folder_override, refuse_batch_words
from runner.config.compose import CONFIG_NAME, VERSION_BASE, Composer
from runner.config.hosts import Host, this_host
from runner.config.hydra_words import COMPLAINTS, explained
from runner.config.trust import trusted_packages
from runner.record.errors import ConfigError, ExitCode, RunnerError
from runner.record.outcome import Result

_FULL_ERROR = "HYDRA_FULL_ERROR"
_PIPE_CLOSED = 141  # 128 + SIGPIPE, as the shell reports it for other programs


def main() -> int:
    """The command line in `sys.argv`; returns the exit code."""
    wants_traceback = os.environ.get(_FULL_ERROR) == "1"
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
        return code
    except RunnerError as error:
        if wants_traceback:
            traceback.print_exc()
        print(f"runner: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("runner: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED


def conf_folder() -> pathlib.Path:
    """The runner's YAML files: inside the package in a wheel, beside it in a checkout."""
    package = pathlib.Path(runner.__file__).absolute().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def run(argv: Sequence[str]) -> int:
    """The command line in `argv`; returns the exit code.

    Raises:
        RunnerError: It cannot be done.
    """
    if "--version" in argv:
        print(f"runner {runner.__version__}, hydra-core {hydra.__version__}")
        return ExitCode.DONE
    if argv and argv[0] in commands.NAMES:
        return commands.run(argv[0], argv[1:])
    asked = arguments.parse(argv)
    composer = Composer(conf_folder(), extra=asked.config_dir, trusted=trusted_packages())
    if asked.empty:
        print(no_job_text(composer), end="")
        print("runner: job must be given: there is no default job", file=sys.stderr)
        return ExitCode.CONFIG
    if asked.shows == "help":
        print(help_text(composer), end="")
        return ExitCode.DONE
    if asked.shows:
        return _show(asked, composer)
    return _run(asked, composer)


def _show(asked: Arguments, composer: Composer) -> int:
    extra = ("~job",) if asked.needs_no_job else ()
    code = _through_hydra(asked, composer, Runs(composer, supervise=_supervise), extra=extra)
    if asked.cfg in ("job", "all"):
        composer.config(asked.overrides)
    return code


def _run(asked: Arguments, composer: Composer) -> int:
    if asked.multirun or "hydra.mode=MULTIRUN" in asked.overrides:
        return _run_batch(asked, composer)
    refuse_batch_words(asked.overrides)
    host = this_host(composer.config(asked.overrides))
    runs = Runs(composer, supervise=_supervise)
    with _output_folder(host) as extra:
        _through_hydra(asked, composer, runs, extra=extra)
    return runs.exit_code


@contextlib.contextmanager
def _output_folder(host: Host) -> Iterator[tuple[str, ...]]:
    """Overrides for the folder that Hydra makes: on a host that is not the first, one to lose."""
    if host.first:
        yield ()
        return
    with tempfile.TemporaryDirectory(prefix=f"runner-host-{host.index}-") as scratch:
        yield (f"hydra.run.dir='{scratch}'",)


def _run_batch(asked: Arguments, composer: Composer) -> int:
    asked = dataclasses.replace(asked, overrides=batch_words(asked.overrides))
    plan = plan_batch(composer, asked.overrides)
    if plan.settings.dry_run:
        show_plan(plan)
        return ExitCode.DONE
    _refuse_hosts(plan)
    # Imported late: it brings TensorBoard's writer, which a wrong key need not wait for.
    from runner.cli.grid import Grid

    runs: Runs | Grid = Runs(composer, supervise=_supervise)
    if plan.ours:
        runs = Grid(plan, command_of(asked))
    register()
    try:
        _through_hydra(asked, composer, runs, extra=(folder_override(plan.folder),))
    finally:
        runs.show()
    return runs.exit_code


def _refuse_hosts(plan: BatchPlan) -> None:
    """A batch has one parent; the hosts of a slice are Ray's to bring together."""
    meshed = (job.config for job in plan.jobs if job.config.parallel.name != "single")
    first = next(meshed, None) if plan.ray is None else None
    if first is not None and (host := this_host(first)).count > 1:
        raise ConfigError(
            f"-m must have hydra/launcher=ray for jobs of several hosts (this is host {host.index} "
            f"of {host.count}); a single job needs no cluster: start it on every host"
        )


def _supervise(asked: Asked) -> Result:
    # Imported late: it brings TensorBoard's writer, which a wrong key need not wait for.
    from runner.batch.supervise import RunPlan, supervise

    plan = RunPlan(
        overrides=asked.overrides,
        config_yaml=asked.config_yaml,
        tensorboard_root=asked.tensorboard_root,
    )
    return supervise(asked.config, asked.folder, plan=plan)


def _through_hydra(
    asked: Arguments, composer: Composer, runs: HydraTask, *, extra: tuple[str, ...] = ()
) -> int:
    decorate = hydra.main(
        config_path=str(conf_folder()), config_name=CONFIG_NAME, version_base=VERSION_BASE
    )
    entry: Any = decorate(runs.run)
    try:
        with _hydra_process([*asked.flags, *asked.overrides, *extra]):
            entry()
    except SystemExit as error:
        return ExitCode.CONFIG if error.code else ExitCode.DONE
    except COMPLAINTS as error:
        raise explained(error, composer.options) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(
            f"the output folder (hydra.run.dir) must be one that can be made: {error}"
        ) from error
    return ExitCode.DONE


@contextlib.contextmanager
def _hydra_process(argv: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv`, and hands exceptions on only when asked for the full error."""
    saved_argv, saved_full = sys.argv, os.environ.get(_FULL_ERROR)
    sys.argv = [sys.argv[0], *argv]
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        os.environ.pop(_FULL_ERROR)
        if saved_full is not None:
            os.environ[_FULL_ERROR] = saved_full
