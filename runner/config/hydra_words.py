"""Hydra's complaints in the runner's words: what is wrong, where, and what there is instead."""

from __future__ import annotations

from collections.abc import Callable

import yaml  # type: ignore[import-untyped,unused-ignore]
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from runner.config.mistakes import did_you_mean, listed
from runner.record.errors import ConfigError

COMPLAINTS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
"""What Hydra raises for a configuration that it cannot use, once it runs something."""

Options = Callable[[str], list[str]]

_NOISE = ("full_key:", "reference_type=", "object_type=", "Error parsing override")


def explained(error: Exception, options: Options) -> ConfigError:
    """The error of a composition.

    Args:
        error: What Hydra, OmegaConf or PyYAML raised.
        options: Gives the options of a group.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_option(error, options)
    if isinstance(error, yaml.YAMLError):
        return ConfigError(f"a YAML file cannot be read: {error}")
    lines = _lines(error) + _lines(error.__cause__)
    if lines and lines[0].startswith("You must specify"):
        group = lines[0].split("'")[1]
        return ConfigError(
            f"{group} must be given, as {group}=NAME; the options are: {listed(options(group))}"
        )
    return ConfigError("\n  ".join(lines) or repr(error))


def unreadable(error: OverrideParseException) -> ConfigError:
    """The error of an override that is not `key=value`."""
    lines = _lines(error)
    reason = lines[0] if lines else "there is no ="
    return ConfigError(
        f"{error.override}: cannot be read as key=value: {reason}. A value with blanks, commas, "
        "brackets or quotes needs quotes of its own: key=\"'a, b'\""
    )


def several_values(item: Override) -> ConfigError:
    """The error of a sweep where one run was asked for."""
    return ConfigError(
        f"{item.input_line}: several values make a batch of jobs; add -m (python -m runner -m "
        "...), or write one value: a list is key=[a,b], a text with a comma is key=\"'a,b'\""
    )


def _no_such_option(error: MissingConfigException, options: Options) -> ConfigError:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    there_are = list(error.options or options(group))
    return ConfigError(
        f"{group}={option}: there is no {option!r} in the group {group!r}"
        f"{did_you_mean(option, there_are)}{_asked_in(error)}; "
        f"the options are: {listed(there_are)}"
    )


def _asked_in(error: MissingConfigException) -> str:
    """The file that asked for the option, where it was not the command line."""
    first = str(error).splitlines()[0]
    if not first.startswith("In '"):
        return ""
    file = first.split("'")[1]
    return "" if file == "config" else f" (asked for in {file}.yaml)"


def _lines(error: BaseException | None) -> list[str]:
    if error is None:
        return []
    lines = (line.strip() for line in str(error).splitlines())
    return [line for line in lines if line and not line.startswith(_NOISE)]
