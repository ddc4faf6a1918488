"""The configuration on its way to a worker: dataclasses to JSON and back, without Hydra."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from runner.config.schema import Config
from runner.config.typed import type_hints


def config_to_json(config: Config) -> dict[str, Any]:
    """A validated configuration as plain JSON values."""
    plain: dict[str, Any] = _plain(config)
    return plain


def config_from_json(plain: dict[str, Any]) -> Config:
    """The configuration that `config_to_json` was given."""
    config: Config = _typed(Config, plain)
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {key: _plain(item) for key, item in vars(value).items()}
    return value


def _typed(cls: type[Any], plain: dict[str, Any]) -> Any:
    hints = type_hints(cls)
    values = {}
    for key, value in plain.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            values[key] = _typed(hint, value)
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            values[key] = hint(value)
        else:
            values[key] = value
    return cls(**values)
