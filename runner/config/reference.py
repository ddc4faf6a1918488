"""What the YAML files alone say of the free sections: their keys, and a value of each key's type.

The reference is a composition in which the command line chose files but set no values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config.schema import Config
from runner.config.typed import known_keys

FREE_SECTIONS = ("model", "data.options", "optim.options")
"""Sections whose keys are named by YAML files instead of the schema."""

Reference = Mapping[str, Mapping[str, Any]]


def reference_of(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Example values of every free section; None where the files leave a value open."""
    examples = {}
    for section in FREE_SECTIONS:
        example = _example(OmegaConf.select(cfg, section, throw_on_missing=False))
        examples[section] = example if isinstance(example, dict) else {}
    return examples


def all_keys(reference: Reference) -> list[str]:
    """Every dotted key that a configuration may set, sections included."""
    free = [key for section in FREE_SECTIONS for key in _nested(reference[section], section)]
    return [*known_keys(Config), *free]


def _example(node: Any) -> Any:
    if isinstance(node, DictConfig):
        return {str(key): _example_item(node, key) for key in node}
    if isinstance(node, ListConfig):
        return [_example_item(node, index) for index in range(len(node))]
    return node


def _example_item(parent: DictConfig | ListConfig, key: Any) -> Any:
    if OmegaConf.is_missing(parent, key):
        return None
    try:
        return _example(parent[key])
    except OmegaConfBaseException:  # it hangs on a key that only the command line sets
        return None


def _nested(values: Any, path: str) -> list[str]:
    if not isinstance(values, dict):
        return []
    keys: list[str] = []
    for name, value in values.items():
        keys += [f"{path}.{name}", *_nested(value, f"{path}.{name}")]
    return keys
