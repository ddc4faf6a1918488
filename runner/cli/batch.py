"""A batch before it starts: which runs it consists of, and whether each is valid."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncherConf
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.errors import HydraException
from omegaconf import DictConfig

from runner.config.compose import Composer
from runner.config.hydra_words import explained
from runner.record.errors import ConfigError


def check_batch(composer: Composer, overrides: Sequence[str]) -> None:
    """Every run of the batch must have a valid configuration.

    A sweeper that chooses its runs as it goes cannot be asked beforehand: its runs are
    checked one by one, as they come.

    Raises:
        ConfigError: One has not; says which.
    """
    hydra = composer.batch(overrides)
    if hydra.launcher.get("_target_") != BasicLauncherConf._target_:
        raise ConfigError(
            "hydra/launcher must be basic: the runner starts each job in a child process of its "
            f"own and must see how it ends; got {hydra.launcher.get('_target_')!r}"
        )
    if hydra.sweeper.get("_target_") != BasicSweeperConf._target_:
        return
    runs = _runs(composer, overrides, hydra)
    if not runs:
        raise ConfigError(f"the batch has no jobs: {' '.join(overrides)} gives no value to run")
    for number, run in enumerate(runs):
        try:
            composer.config(run)
        except ConfigError as error:
            if len(runs) == 1:
                raise
            raise ConfigError(f"job {number} of 0 to {len(runs) - 1}: {error}") from error


def _runs(composer: Composer, overrides: Sequence[str], hydra: DictConfig) -> list[tuple[str, ...]]:
    params = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    parsed = composer.parse([*params, *overrides])
    settings = [item.input_line or "" for item in parsed if item.is_hydra_override()]
    swept = [item for item in parsed if not item.is_hydra_override()]
    try:
        (runs,) = BasicSweeper.split_arguments(swept, None)
    except HydraException as error:
        raise explained(error, composer.options) from error
    return [(*settings, *run) for run in runs]
