"""What a configuration may name: modules to run code from, and folders to write to.

A configuration is data. It can come from somebody else, so it may point only at code that the
user of this process trusts: the package `jobs`, and what the environment variable RUNNER_TRUST
lists. Hydra's own ways of naming code (`_target_`, logging factories) are closed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from runner.config.mistakes import Mistake

TRUST_VARIABLE = "RUNNER_TRUST"

_ENTRY = re.compile(r"(?P<package>[A-Za-z_]\w*)(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.")


def trusted_packages(environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Top-level packages whose code a configuration may name."""
    listed = environment.get(TRUST_VARIABLE, "").split(",")
    return frozenset({"jobs"} | {name.strip() for name in listed if name.strip()})


def check_entry(entry: str, *, key: str, trusted: frozenset[str]) -> None:
    """`entry` must be `package.module:Name` of a trusted package.

    Raises:
        Mistake: It is not.
    """
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise Mistake(key, f"{key} must look like package.module:Name; got {entry!r}")
    package = match["package"]
    if package not in trusted:
        wanted = ",".join(sorted((trusted - {"jobs"}) | {package}))
        raise Mistake(
            key,
            f"{key} names code in the package {package!r}, which is not trusted: a configuration "
            f"may be somebody else's, so it runs only code that you named; got {entry!r}. "
            f"If you trust it: export {TRUST_VARIABLE}={wanted}",
        )


def check_name(name: str, *, key: str) -> None:
    """`name` becomes a folder, and must not lead out of the output folder.

    Raises:
        Mistake: It could.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise Mistake(
            key,
            f"{key} must be 1 to 100 of A-Z a-z 0-9 . _ - and not begin with a dot: "
            f"it becomes a folder; got {name!r}",
        )


def refuse_targets(values: Any) -> None:
    """No `_target_` anywhere: the runner calls nothing that a configuration names so.

    Raises:
        Mistake: There is one.
    """
    for key, value in _walk(values, ""):
        if key.rpartition(".")[2] == "_target_":
            raise Mistake(
                key,
                f"{key} must go: _target_ can name any code, and a configuration only names "
                f"jobs and data, by job.entry and data.entry; got {value!r}",
            )


def check_hydra(values: Mapping[str, Any]) -> None:
    """Hydra's own section may name installed Hydra plugins and no other code.

    Raises:
        Mistake: It names code in another way, or sets environment variables.
    """
    if values["job"]["env_set"]:
        raise Mistake(
            "hydra.job.env_set",
            "hydra.job.env_set must be empty: variables such as LD_PRELOAD run code; set yours "
            f"in the shell; got {sorted(values['job']['env_set'])}",
        )
    for key, value in _walk(values, "hydra"):
        if _names_code(key.rpartition(".")[2], value):
            raise Mistake(
                key,
                f"{key} must name an installed Hydra plugin: anything else is code that a "
                f"configuration has no business to run; got {value!r}",
            )


def _names_code(name: str, value: Any) -> bool:
    if name == "_target_":
        return not str(value).startswith(_PLUGINS)
    if name == "()":
        return True
    if name == "class":
        return not str(value).startswith("logging.")
    streams = ("ext://sys.stdout", "ext://sys.stderr")
    return isinstance(value, str) and value.startswith("ext://") and value not in streams


def _walk(values: Any, path: str) -> Iterator[tuple[str, Any]]:
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(values, Mapping):
        items = iter(values.items())
    elif isinstance(values, list):
        items = iter(enumerate(values))
    for name, value in items:
        key = f"{path}.{name}" if path else str(name)
        yield key, value
        yield from _walk(value, key)
