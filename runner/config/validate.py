"""From Hydra's composed configuration to the frozen `Config`, or to one readable mistake.

Also what is derived from a configuration as a whole: its hash, and its text for `config.yaml`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from runner.config import trust
from runner.config.mistakes import Mistake
from runner.config.rules import check_rules
from runner.config.schema import Config
from runner.config.typed import build, check_like, check_section

#: The C one, where PyYAML has it, takes a tenth of the time.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def validate(
    cfg: DictConfig, *, reference: Mapping[str, Mapping[str, Any]], trusted: frozenset[str]
) -> Config:
    """The typed configuration.

    Args:
        cfg: The composed configuration, without Hydra's section.
        reference: Keys and example values of each free section (`runner.config.reference`).
        trusted: Top-level packages whose code may be named.

    Raises:
        Mistake: A key, a type or a rule is broken; nothing was started.
    """
    return validate_values(plain(cfg), reference=reference, trusted=trusted)


def validate_values(
    values: dict[str, Any],
    *,
    reference: Mapping[str, Mapping[str, Any]],
    trusted: frozenset[str],
) -> Config:
    """As `validate`, of values as `plain` gives them."""
    trust.refuse_targets(values)
    config = build(Config, values)
    check_section(config.model, reference["model"], path="model")
    check_section(config.data.options, reference["data.options"], path="data.options")
    trust.check_name(config.job.name, key="job.name")
    trust.check_entry(config.job.entry, key="job.entry", trusted=trusted)
    trust.check_entry(config.data.entry, key="data.entry", trusted=trusted)
    check_rules(config)
    for name, value in config.optim.options.items():
        check_like(value, reference["optim.options"].get(name), key=f"optim.options.{name}")
    return config


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The values of `cfg`, every interpolation resolved.

    Raises:
        Mistake: A value is missing or an interpolation leads nowhere.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise Mistake(key, f"{key} has no value: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def config_hash(config: Config) -> str:
    """SHA-256 of every value; equal for equal configurations, whatever they were written as."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shown_yaml(cfg: DictConfig) -> str:
    """The configuration for people and for `config.yaml`, as YAML.

    Everything is resolved except what comes from the environment, directly or through other
    keys: that may be a secret, so its interpolation is written instead.
    """
    reads: list[str] = []
    with _environment_reads(reads):
        return yaml_text(_shown(cfg, reads))


def yaml_text(values: Any) -> str:
    """Plain values as YAML."""
    text: str = yaml.dump(values, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
    return text


def _shown(node: Any, reads: list[str]) -> Any:
    if isinstance(node, DictConfig):
        return {str(key): _shown_item(node, key, reads) for key in node}
    if isinstance(node, ListConfig):
        return [_shown_item(node, index, reads) for index in range(len(node))]
    return node.value if hasattr(node, "value") else node


def _shown_item(parent: DictConfig | ListConfig, key: Any, reads: list[str]) -> Any:
    if not OmegaConf.is_interpolation(parent, key):
        return None if parent[key] is None else _shown(parent[key], reads)
    reads.clear()
    value = parent[key]
    if reads:
        raw = OmegaConf.to_container(parent, resolve=False)
        assert isinstance(raw, (dict, list))
        return raw[key]
    return _shown(value, reads)


@contextlib.contextmanager
def _environment_reads(reads: list[str]) -> Iterator[None]:
    """Note in `reads` every environment variable that an interpolation asks for."""

    def recorded(key: str, *default: Any) -> Any:
        reads.append(key)
        return oc.env(key, *default)

    OmegaConf.register_new_resolver("oc.env", recorded, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
