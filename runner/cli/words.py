"""Words of the command line that stand for keys of the `batch` section."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from runner.batch.ledger import Command
from runner.cli.arguments import Arguments
from runner.record.errors import ConfigError

_WORDS = {
    "dry_run": "batch.dry_run",
    "resume=true": "batch.resume=true",
    "resume=false": "batch.resume=false",
}


def batch_words(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides of a batch with every word replaced by its key.

    `resume=` has another meaning for a single run, so that only its two flags are words.
    """
    return tuple(_WORDS.get(line, _with_key(line)) for line in overrides)


def refuse_batch_words(overrides: Sequence[str]) -> None:
    """A setting of a batch has no effect on a single run.

    Raises:
        ConfigError: There is one.
    """
    for line in overrides:
        key = line.partition("=")[0]
        if key == "dry_run" or key.startswith(("batch.", "ray.")):
            raise ConfigError(f"{line}: this is for a batch of jobs; add -m (python -m runner -m)")
        if line in _WORDS:
            raise ConfigError(
                f"{line}: this is for a batch of jobs; a single run goes on by "
                "`python -m runner resume RUNDIR`"
            )


def command_of(asked: Arguments) -> Command:
    """What to write down of a batch's command line, so that the batch can be gone on with."""
    once = ("batch.resume=", "batch.dry_run=")
    kept = tuple(line for line in asked.overrides if not line.startswith(once))
    config_dir = None if asked.config_dir is None else str(asked.config_dir.absolute())
    return Command(overrides=kept, config_dir=config_dir, cwd=os.getcwd())


def folder_override(folder: pathlib.Path) -> str:
    """Tells Hydra the folder of a batch."""
    quoted = str(folder).replace("'", "\\'")
    return f"hydra.sweep.dir='{quoted}'"


def _with_key(line: str) -> str:
    key, equals, value = line.partition("=")
    return f"{_WORDS[key]}={value}" if equals and key in _WORDS else line
