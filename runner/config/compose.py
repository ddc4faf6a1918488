"""Composition: the YAML files and the command line become one configuration.

The only place that reaches into Hydra's internals (pinned at 1.3.8): Hydra composes here before
it is asked to run anything, so that every mistake is found early and told in our words.
"""

from __future__ import annotations

import functools
import operator
import pathlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.utils import setup_globals
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.config import trust
from runner.config.chips import ALIASES, SLICES
from runner.config.hydra_words import explained, several_values, unreadable
from runner.config.mistakes import Mistake, listed, nearest_name
from runner.config.reference import Reference, all_keys, reference_of
from runner.config.rules import check_installed
from runner.config.schema import Config
from runner.config.validate import plain, validate_values
from runner.record.errors import ConfigError

CONFIG_NAME = "config"
VERSION_BASE = "1.3"

_INSTANTIATED = ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging")
_OPEN = "optim.options."
#: Choices of files, and lists of overrides, whose composition is kept at hand.
_REMEMBERED = 64

# A value, or another where it is null.
OmegaConf.register_new_resolver(
    "runner.or", lambda value, other: other if value is None else value, replace=True
)


class Composer:
    """Composes and validates configurations from one set of folders.

    Args:
        conf: The runner's own YAML files.
        extra: The user's own YAML files (`--config-dir`), or None.
        trusted: Top-level packages whose code a configuration may name.
    """

    def __init__(
        self, conf: pathlib.Path, *, extra: pathlib.Path | None, trusted: frozenset[str]
    ) -> None:
        version.setbase(VERSION_BASE)
        setup_globals()
        _store_slices()
        search_path = create_config_search_path(str(conf))
        if extra is not None:
            schema = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{extra.absolute()}", schema)
        self._loader = ConfigLoaderImpl(search_path)
        self._parser = OverridesParser.create(self._loader)
        self._trusted = trusted
        self._parsed = functools.lru_cache(maxsize=_REMEMBERED)(self._parse_line)
        self._split = functools.lru_cache(maxsize=_REMEMBERED)(self._split_overrides)
        self._files = functools.lru_cache(maxsize=_REMEMBERED)(self._compose_files)
        self._plain_files = functools.lru_cache(maxsize=_REMEMBERED)(self._compose_plain_files)
        self._reference = functools.lru_cache(maxsize=_REMEMBERED)(self._compose_reference)
        self._is_group = functools.lru_cache(maxsize=None)(self._loader.repository.group_exists)

    def config(self, overrides: Sequence[str]) -> Config:
        """The valid configuration of one run.

        Raises:
            ConfigError: An override or a YAML file cannot be read, names what is not there,
                or breaks a rule.
        """
        return self.validated(_task(self.composed(overrides)), overrides=overrides)

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """The whole configuration of one run, Hydra's section included, its rules not checked.

        Files are read once for each choice of files: the jobs of a sweep mostly differ in
        values, and Hydra takes 0.1 s for a composition.

        Raises:
            ConfigError: As for `config`.
        """
        kept, setters = self._split(tuple(overrides))
        self._check_keys(_own(setters), self._reference(kept))
        whole = self._files(kept).copy()
        OmegaConf.set_readonly(whole.hydra, False)  # HydraConfig has made it so
        try:
            ConfigLoaderImpl._apply_overrides_to_config(list(setters), whole)
        except Exception as error:  # as in _load
            raise explained(error, self.options) from error
        if any(item.is_hydra_override() for item in setters):
            _check_hydra(whole)
        return whole

    def validated(self, cfg: DictConfig, *, overrides: Sequence[str]) -> Config:
        """The typed form of `cfg`, which was composed from `overrides`.

        Raises:
            ConfigError: A key, a type or a rule is broken; says what set it.
        """
        return self._valid(lambda: plain(cfg), overrides)

    def quick(self, overrides: Sequence[str]) -> tuple[dict[str, Any], Config] | None:
        """Plain values and typed form of a run whose overrides only set plain values.

        As `composed` and `validated`, in a tenth of the time, for sweeps; None where values
        may hang on each other or on Hydra's section.

        Raises:
            ConfigError: As for `config`.
        """
        kept, setters = self._split(tuple(overrides))
        base = self._plain_files(kept)
        if base is None or not all(map(_is_quick, setters)):
            return None
        self._check_keys(setters, self._reference(kept))
        values = pickle.loads(base)
        for item in setters:
            *sections, name = item.key_or_group.split(".")
            target = functools.reduce(operator.getitem, sections, values)
            target[name] = item.value()
        return values, self._valid(lambda: values, overrides)

    def _valid(self, values: Callable[[], dict[str, Any]], overrides: Sequence[str]) -> Config:
        kept, setters = self._split(tuple(overrides))
        try:
            reference = self._reference(kept)
            config = validate_values(values(), reference=reference, trusted=self._trusted)
            check_installed(config)
            return config
        except Mistake as mistake:
            origin = self._origin(mistake.key, kept, _own(setters))
            raise ConfigError(f"{mistake}{origin}") from mistake

    def batch(self, overrides: Sequence[str]) -> DictConfig:
        """The composition of a batch of runs, as far as they have it in common.

        Raises:
            ConfigError: As for `config`.
        """
        return self._load(overrides, RunMode.MULTIRUN)

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """The overrides, parsed.

        Raises:
            ConfigError: One cannot be read.
        """
        return [self._parsed(line) for line in overrides]

    def _parse_line(self, line: str) -> Override:
        try:
            (item,) = self._parser.parse_overrides([line])
        except OverrideParseException as error:
            raise unreadable(error) from error
        return item

    def options(self, group: str) -> list[str]:
        """The options of a group, such as the jobs that there are."""
        return self._loader.repository.get_group_options(group, ObjectType.CONFIG)

    def file(self, group: str, option: str) -> Any:
        """The plain content of one YAML file, as it is written.

        Raises:
            ConfigError: It cannot be read.
        """
        try:
            loaded = self._loader.repository.load_config(f"{group}/{option}")
        except Exception as error:  # as in _load
            raise explained(error, self.options) from error
        assert loaded is not None, f"{group}/{option} is listed but not there"
        return OmegaConf.to_container(loaded.config, resolve=False)

    def _load(self, overrides: Sequence[str], mode: RunMode) -> DictConfig:
        try:
            whole = self._loader.load_configuration(CONFIG_NAME, list(overrides), run_mode=mode)
        except Exception as error:  # Hydra and PyYAML raise many types; all are a bad file or line
            raise explained(error, self.options) from error
        _check_hydra(whole)
        return whole

    def _compose_files(self, kept: tuple[str, ...]) -> DictConfig:
        return self._load(kept, RunMode.RUN)

    def _compose_plain_files(self, kept: tuple[str, ...]) -> bytes | None:
        """Pickled, since each job of a sweep changes a copy of it."""
        task = _task(self._files(kept))
        return None if "${" in str(task) else pickle.dumps(plain(task))

    def _compose_reference(self, kept: tuple[str, ...]) -> Reference:
        return reference_of(_task(self._files(kept)))

    def _split_overrides(
        self, overrides: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[Override, ...]]:
        """What chooses files, and what sets values in them."""
        parsed = self.parse(overrides)
        for item in parsed:
            if item.is_sweep_override():
                raise several_values(item)
        setters = tuple(item for item in parsed if self._sets_value(item))
        lines = {item.input_line for item in setters}
        return tuple(line for line in overrides if line not in lines), setters

    def _sets_value(self, item: Override) -> bool:
        if item.key_or_group == "hydra.searchpath":
            return False
        return isinstance(item.value(), dict) or not self._is_group(item.key_or_group)

    def _defaults(self, overrides: Sequence[str]) -> Any:
        try:
            return self._loader.compute_defaults_list(CONFIG_NAME, list(overrides), RunMode.RUN)
        except Exception as error:  # as in _load
            raise explained(error, self.options) from error

    def _check_keys(self, values: Sequence[Override], reference: Reference) -> None:
        known = all_keys(reference)
        for item in values:
            added = item.is_add() or item.is_force_add()
            open_ended = added and item.key_or_group.startswith(_OPEN)
            if item.key_or_group not in known and not open_ended:
                raise self._no_such_key(item, known)

    def _no_such_key(self, item: Override, known: Sequence[str]) -> ConfigError:
        key = item.key_or_group
        trust.refuse_targets({key: item.value()})
        nearest = nearest_name(key, known)
        section = key.rpartition(".")[0]
        beside = [name for name in known if name.rpartition(".")[0] == section]
        message = f"{item.input_line}: there is no key {key!r}"
        message += f" (did you mean {nearest!r}?)" if nearest else ""
        message += f"; beside it there are: {listed(beside)}" if beside else ""
        if key.startswith(_OPEN):
            message += f". To hand torch an option that is not listed, add it: +{item.input_line}"
        return ConfigError(message)

    def _origin(self, key: str, kept: Sequence[str], values: Sequence[Override]) -> str:
        """What set `key`, as the end of a message."""
        for item in reversed(values):
            if key == item.key_or_group or key.startswith(f"{item.key_or_group}."):
                return f" (on the command line: {item.input_line})"
        for default in reversed(self._defaults(kept).defaults):
            if self._sets(default, key):
                return f" (in {default.config_path}.yaml)"
        return ""

    def _sets(self, default: ResultDefault, key: str) -> bool:
        package = default.package or ""
        loaded = self._loader.repository.load_config(default.config_path or "")
        if loaded is None or not key.startswith(package):
            return False
        inside = key.removeprefix(package).removeprefix(".")
        return OmegaConf.select(loaded.config, inside, throw_on_missing=False) is not None


def _store_slices() -> None:
    """Makes every slice an option of `hardware=`, as if each had a file."""
    store = ConfigStore.instance()
    for option, name in (*((name, name) for name in SLICES), *ALIASES.items()):
        node = {"name": name, "devices": None, "peak_flops_per_s": None}
        store.store(group="hardware", name=option, node=node)


def _own(setters: Sequence[Override]) -> list[Override]:
    """Those that set a key of the runner's, not of Hydra's."""
    return [item for item in setters if not item.is_hydra_override() and item.package is None]


def _is_quick(item: Override) -> bool:
    """Whether it sets one key to a plain value."""
    quick = item.type is OverrideType.CHANGE and item.package is None
    value = item.value()
    return (
        quick
        and not item.is_hydra_override()
        and not isinstance(value, dict | list)
        and ("${" not in str(value))
    )


def _task(whole: DictConfig) -> DictConfig:
    cfg = whole.copy()
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _check_hydra(whole: DictConfig) -> None:
    """Hydra's section may name only Hydra's own code and that of installed plugins."""
    HydraConfig.instance().set_config(whole)  # for ${hydra:...} in values
    sections: dict[str, Any] = {
        name: plain(whole.hydra[name]) for name in _INSTANTIATED if whole.hydra[name]
    }
    trust.check_hydra({**sections, "job": {"env_set": plain(whole.hydra.job.env_set)}})
