"""One job of a sweep, composed: its configuration, its text, and its folder within the sweep's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from runner.config.compose import Composer
from runner.config.schema import Config
from runner.config.validate import shown_yaml, yaml_text
from runner.record.errors import ConfigError

_KEY = "hydra.sweep.subdir"
_PLAIN_INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")


@dataclasses.dataclass(frozen=True)
class ComposedJob:
    """A job of a sweep.

    Attributes:
        config: What to do.
        config_yaml: The content of its `config.yaml`.
        folder: Its run folder, relative to the sweep's.
        overrides: What was asked for of it, Hydra's own settings left out.
    """

    config: Config
    config_yaml: str
    folder: str
    overrides: tuple[str, ...]


class SweepComposer:
    """Composes the jobs of a sweep.

    Args:
        composer: Composes single runs.
        hydra: Hydra's section of the sweep.
    """

    def __init__(self, composer: Composer, hydra: DictConfig) -> None:
        self._composer = composer
        self._job_config = hydra.job.config.override_dirname
        sweep = OmegaConf.to_container(hydra.sweep, resolve=False)
        assert isinstance(sweep, dict)
        self._subdir = str(sweep["subdir"])

    def job(self, overrides: Sequence[str], *, number: int) -> ComposedJob:
        """The job that these overrides ask for.

        Raises:
            ConfigError: They cannot be read, name what is not there, or break a rule; or the
                job's folder cannot be told.
        """
        own = [item for item in self._composer.parse(overrides) if not item.is_hydra_override()]
        numbers = self._numbers(own, number)
        lines = [item.input_line or "" for item in own]
        quick = self._composer.quick(lines)
        if quick is None:
            config, text, values = self._slow(overrides, numbers)
        else:
            values, config = quick
            text = yaml_text(values)
        return ComposedJob(config, text, self._folder(values, numbers), tuple(lines))

    def _slow(
        self, overrides: Sequence[str], numbers: dict[str, Any]
    ) -> tuple[Config, str, dict[str, Any]]:
        """For values that hang on each other, or on Hydra's section."""
        whole = self._composer.composed(overrides)
        with read_write(whole.hydra), open_dict(whole.hydra):
            whole.hydra.job.update(numbers)
        HydraConfig.instance().set_config(whole)
        with read_write(whole), open_dict(whole):
            del whole["hydra"]
        config = self._composer.validated(whole, overrides=overrides)
        return config, shown_yaml(whole), dict(whole)

    def _numbers(self, own: list[Override], number: int) -> dict[str, Any]:
        """What Hydra's section says of a job of a sweep."""
        given = self._job_config
        dirname = get_overrides_dirname(
            overrides=own,
            kv_sep=given.kv_sep,
            item_sep=given.item_sep,
            exclude_keys=given.exclude_keys,
        )
        return {"num": number, "id": str(number), "override_dirname": dirname}

    def _folder(self, values: dict[str, Any], numbers: dict[str, Any]) -> str:
        named = {key: value for key, value in values.items() if key in self._subdir}
        known = {**named, "hydra": {"job": numbers, "sweep": {"subdir": ""}}}
        folder = _filled(self._subdir, known)
        if folder is None:
            cfg = OmegaConf.create(known)
            cfg.hydra.sweep.subdir = self._subdir
            try:
                folder = str(cfg.hydra.sweep.subdir or "")
            except OmegaConfBaseException as error:
                raise ConfigError(f"{_KEY} has no value: {str(error).splitlines()[0]}") from error
        parts = folder.split("/")
        if not all(parts) or ".." in parts:
            raise ConfigError(
                f"{_KEY} must be a folder below the batch's, one for each job; got {folder!r}"
            )
        return folder


def _filled(text: str, values: dict[str, Any]) -> str | None:
    """OmegaConf's interpolation of plain keys, without nodes; None where there is more to it."""
    pieces = _PLAIN_INTERPOLATION.split(text)
    if any("$" in piece or "\\" in piece for piece in pieces[::2]):
        return None
    for i in range(1, len(pieces), 2):
        value: Any = values
        for key in pieces[i].split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if type(value) not in (str, int) or "$" in str(value):
            return None
        pieces[i] = str(value)
    return "".join(pieces)
