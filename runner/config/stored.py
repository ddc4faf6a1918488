"""A run's `config.yaml`, read back: to compare with, or to go on from."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import yaml  # type: ignore[import-untyped,unused-ignore]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config.hydra_words import unreadable
from runner.config.reference import reference_of
from runner.config.schema import Config
from runner.config.typed import build
from runner.config.validate import plain, shown_yaml, validate
from runner.record.errors import ConfigError


def read_config(path: pathlib.Path) -> Config:
    """The configuration in a file that the runner wrote, its rules not checked.

    Raises:
        ConfigError: It cannot be read, or has keys or types of another version.
    """
    return build(Config, plain(_load(path)))


def changed_config(
    path: pathlib.Path, overrides: Sequence[str], *, trusted: frozenset[str]
) -> tuple[Config, str]:
    """The configuration in such a file with some keys set anew, and its text.

    Args:
        path: The `config.yaml`.
        overrides: `key=value`, as on the command line.
        trusted: Top-level packages whose code may be named.

    Raises:
        ConfigError: The file or an override cannot be read, or a rule is broken.
    """
    cfg = _load(path)
    reference = reference_of(cfg)
    for key, value in _parsed(overrides):
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return validate(cfg, reference=reference, trusted=trusted), shown_yaml(cfg)


def _load(path: pathlib.Path) -> DictConfig:
    try:
        cfg = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path} must hold a configuration, written by an earlier run")
    return cfg


def _parsed(overrides: Sequence[str]) -> list[tuple[str, object]]:
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise unreadable(error) from error
    for item in parsed:
        if item.is_add() or item.is_force_add() or item.is_delete() or item.is_sweep_override():
            raise ConfigError(
                f"{item.input_line}: a run that goes on takes key=value, one value a key"
            )
    return [(item.key_or_group, item.value()) for item in parsed]
