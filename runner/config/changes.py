"""What differs between two configurations of one run, and what of it may."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from runner.config.codec import config_to_json
from runner.config.schema import Config
from runner.record.errors import ConfigError

#: Keys and sections that change neither what is trained nor where its checkpoints are.
_FREE = (
    "steps",
    "log_every",
    "eval_every",
    "strict",
    "resume",
    "batch",
    "init_from",
    "checkpoint",
    "profile",
    "sinks",
    "retries",
    "timeouts",
    "hardware",
    "parallel",
    "data.root",
    "data.workers",
    "data.prefetch",
    "job.about",
)
_FIXED = ("checkpoint.root",)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Every dotted key whose value differs, with both values; None where there is none."""
    before, after = (dict(_flat(config_to_json(config), "")) for config in (old, new))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def check_unchanged(old: Config, new: Config, *, folder: os.PathLike[str]) -> None:
    """A run goes on with the configuration that it began with.

    Raises:
        ConfigError: A key differs that may not; shows all of them.
    """
    changed = {key: pair for key, pair in differences(old, new).items() if not _is_free(key)}
    if changed:
        lines = "".join(f"\n  {key}: {a!r} -> {b!r}" for key, (a, b) in changed.items())
        raise ConfigError(
            f"a run that has checkpoints must go on with its own configuration; in "
            f"{os.fspath(folder)} it was another:{lines}\n"
            f"Go on without these changes, or start a new run (with init_from=, if it is to take "
            "the weights)"
        )


def _is_free(key: str) -> bool:
    free = any(key == name or key.startswith(f"{name}.") for name in _FREE)
    return free and key not in _FIXED


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
