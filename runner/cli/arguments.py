"""The command line's flags: Hydra's own, read once, with mistakes told in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from runner.record.errors import ConfigError

_REFUSED = {
    "experimental_rerun": "it loads a pickle, and a pickle can run any code",
    "config_name": "the runner's keys are those of its own config.yaml; add files of yours with "
    "--config-dir",
    "config_path": "the runner's keys are those of its own config.yaml; add files of yours with "
    "--config-dir",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What was asked for.

    Attributes:
        overrides: Every `key=value`, in order.
        flags: The flags, as Hydra reads them.
        config_dir: The user's own YAML files, or None.
        multirun: Whether it is a batch.
        shows: The flag that shows something instead of running ("help", "cfg", ...), or "".
        cfg: The value of `--cfg`, or "".
    """

    overrides: tuple[str, ...]
    flags: tuple[str, ...]
    config_dir: pathlib.Path | None
    multirun: bool
    shows: str
    cfg: str

    @property
    def empty(self) -> bool:
        """Whether nothing was asked for."""
        return not (self.overrides or self.shows or self.multirun)

    @property
    def needs_no_job(self) -> bool:
        """Whether it is a question that has an answer without a job."""
        names_job = any(line.partition("=")[0] == "job" for line in self.overrides)
        return self.shows == "info" and not names_job


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments; flags and overrides may stand in any order.

    Raises:
        ConfigError: A flag is unknown, misused or refused.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            found = vars(get_args_parser().parse_intermixed_args(list(argv)))
    except SystemExit:
        reason = complaint.getvalue().strip().rpartition("error: ")[2]
        raise ConfigError(f"{reason}; --hydra-help lists every flag") from None
    for name, why in _REFUSED.items():
        if found[name] is not None:
            raise ConfigError(f"--{name.replace('_', '-')} must not be given: {why}")
    asked = ("help", "hydra_help", "cfg", "info", "shell_completion")
    return Arguments(
        overrides=tuple(found["overrides"]),
        flags=_flags(found),
        config_dir=_config_dir(found["config_dir"]),
        multirun=found["multirun"],
        shows=next((name for name in asked if found[name]), ""),
        cfg=found["cfg"] or "",
    )


def _flags(found: dict[str, object]) -> tuple[str, ...]:
    flags = []
    for name, value in found.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif isinstance(value, str):
            flags.append(f"{flag}={value}")
    return tuple(flags)


def _config_dir(given: str | None) -> pathlib.Path | None:
    if given is None:
        return None
    folder = pathlib.Path(given)
    if not folder.is_dir():
        raise ConfigError(f"--config-dir must be a folder with YAML files; got {given!r}")
    return folder
