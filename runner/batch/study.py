"""Optuna, as far as a search needs it: a seeded TPE sampler, a median pruner, a SQLite file.

The only importer of optuna. What a trial is as a job is `runner.batch.search`'s.
"""

from __future__ import annotations

import pathlib
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping

import optuna
from optuna.samplers import TPESampler
from optuna.trial import Trial, TrialState

from runner.config.search import Dimension, SearchConfig, Space, Value
from runner.record.errors import ConfigError

FILE_NAME = "search.db"
_NAME = "search"
_SPACE, _METRIC = "space", "metric"


class Study:
    """The trials of a search, in the batch's folder. Every call is made under the batch's lock.

    Args:
        folder: The batch's folder; a study in it is gone on with.
        space: What is searched.
        config: The `hydra.sweeper` section.
        metric: What trials are compared by.
        largest: Whether more of it is better.

    Raises:
        ConfigError: The study in the folder is another search's.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        space: Space,
        *,
        config: SearchConfig,
        metric: str,
        largest: bool,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self._path = folder / FILE_NAME
        self._config = config
        self._space = space
        pruner = optuna.pruners.MedianPruner(n_startup_trials=config.prune_startup_trials)
        # As a URI: a path may hold characters that mean something in a URL.
        url = f"sqlite:///file:{urllib.parse.quote(str(self._path))}?uri=true"
        self._study = optuna.create_study(
            storage=optuna.storages.RDBStorage(url),
            study_name=_NAME,
            direction="maximize" if largest else "minimize",
            pruner=pruner if config.prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        self._claim({_SPACE: space.described(), _METRIC: [metric, largest]})

    def trials(self) -> Iterator[tuple[Trial, dict[str, Value], bool]]:
        """Every trial so far in the order of their numbers, its values, and whether it is over."""
        for each in self._study.get_trials(deepcopy=False):
            self._seed(each.number)
            trial, over = Trial(self._study, each._trial_id), each.state.is_finished()
            # A process that was killed may have chosen some of the values only.
            yield trial, dict(each.params) if over else self._choose(trial), over

    def ask(self, number: int) -> tuple[Trial, dict[str, Value]]:
        """A new trial, the `number`th from 0, and its values."""
        self._seed(number)
        trial = self._study.ask()
        assert trial.number == number, "nobody else writes to the study"
        return trial, self._choose(trial)

    def is_hopeless(self, trial: Trial, *, step: int, value: float) -> bool:
        """Note a trial's metric after `step` updates; whether to stop it."""
        trial.report(value, step)
        return trial.should_prune()

    def succeeded(self, trial: Trial, value: float) -> None:
        """A trial is over."""
        self._study.tell(trial, value)

    def pruned(self, trial: Trial) -> None:
        """A trial was stopped; what it reported counts."""
        self._study.tell(trial, state=TrialState.PRUNED)

    def failed(self, trial: Trial) -> None:
        """A trial says nothing."""
        self._study.tell(trial, state=TrialState.FAIL)

    def _seed(self, number: int) -> None:
        """A sampler for each trial, so that a search that goes on draws what it would have."""
        self._study.sampler = TPESampler(
            seed=(self._config.seed * 1_000_003 + number) % 2**32,
            n_startup_trials=self._config.startup_trials,
            constant_liar=True,  # trials that run now are not tried again
        )

    def _choose(self, trial: Trial) -> dict[str, Value]:
        return {each.key: _choose(trial, each) for each in self._space.dimensions}

    def _claim(self, attributes: Mapping[str, object]) -> None:
        """Note what the study is about, or compare it with what is noted."""
        for name, value in attributes.items():
            noted = self._study.user_attrs.get(name)
            if noted is None:
                self._study.set_user_attr(name, value)
            elif noted != value:
                raise ConfigError(
                    f"{self._path} holds a search with another {name}: go on with the same "
                    f"overrides, or choose another folder (batch.name); it has {noted}, "
                    f"asked for is {value}"
                )


def _choose(trial: Trial, each: Dimension) -> Value:
    if each.choices:
        return str(trial.suggest_categorical(each.key, each.choices))
    if each.whole:
        low, high, step = int(each.low), int(each.high), int(each.step or 1)
        return trial.suggest_int(each.key, low, high, step=step, log=each.log)
    return trial.suggest_float(each.key, each.low, each.high, step=each.step, log=each.log)
