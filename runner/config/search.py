"""A search: what `hydra/sweeper=optuna` can be told, and the space that overrides span.

`key=interval(0.1, 1)`, `key=choice(a, b)` or `key=a,b`, `key=range(1, 9)`, with `int(...)` and
`tag(log, ...)` around them, as for Hydra's Optuna plugin. A range ends before its stop, as it
does in a grid. Which trial comes next is not known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from runner.config.mistakes import listed
from runner.config.schema import HardwareConfig
from runner.record.errors import ConfigError

_LOG = "log"


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """The `hydra.sweeper` section of a search.

    Attributes:
        n_trials: Trials in all, those of earlier processes included.
        seed: Fixes what is tried; with several trials at a time their order matters too.
        startup_trials: Trials at random, before the sampler goes by what it has seen.
        prune: Whether a trial is stopped that is worse than the median of those before it.
        prune_startup_trials: Trials that must have succeeded before one is pruned.
        prune_reports: How often in its life a trial is compared.
        params: Further dimensions of the space, key to text such as "interval(0.1, 1)".
    """

    n_trials: int = 20
    seed: int = 0
    startup_trials: int = 10
    prune: bool = True
    prune_startup_trials: int = 5
    prune_reports: int = 10
    params: dict[str, Any] | None = None

    def check(self) -> None:
        """Every rule.

        Raises:
            ConfigError: One is broken.
        """
        least = {"n_trials": 1, "seed": 0, "startup_trials": 1, "prune_startup_trials": 1}
        for name, minimum in {**least, "prune_reports": 2}.items():
            value = getattr(self, name)
            if value < minimum:
                raise ConfigError(f"hydra.sweeper.{name} must be >= {minimum}; got {value}")


Value = float | int | str


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One key that is searched.

    Attributes:
        key: The key, as it stands before the `=`.
        choices: Its values as they stand after it, or () for a number between two ends.
        low: The smallest number.
        high: The largest number.
        whole: Whether the numbers are whole.
        step: Their distance, or None for any.
        log: Whether their logarithm is what is even.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    step: float | None = None
    log: bool = False

    def line(self, value: Value) -> str:
        """The override that gives the key this value."""
        return f"{self.key}={value}" if isinstance(value, str) else f"{self.key}={value!r}"

    def ends(self) -> tuple[Value, ...]:
        """Every choice, or both ends."""
        if self.choices:
            return self.choices
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Space:
    """What a search varies, and what it holds fixed.

    Attributes:
        fixed: Overrides that every trial has.
        dimensions: The keys that are searched.
    """

    fixed: tuple[str, ...]
    dimensions: tuple[Dimension, ...]

    def lines(self, values: Mapping[str, Value]) -> list[str]:
        """The overrides of the trial with these values."""
        return [*self.fixed, *(each.line(values[each.key]) for each in self.dimensions)]

    def corners(self) -> list[list[str]]:
        """Trials in which every end and every choice occurs: all keys must bear them."""
        first = {each.key: each.ends()[0] for each in self.dimensions}
        return [self.lines(first)] + [
            self.lines({**first, each.key: end})
            for each in self.dimensions
            for end in each.ends()[1:]
        ]

    def described(self) -> list[dict[str, Any]]:
        """The dimensions as plain values, to tell whether two spaces are the same."""
        plain = [dataclasses.asdict(each) for each in self.dimensions]
        return [{**each, "choices": list(each["choices"])} for each in plain]


@dataclasses.dataclass(frozen=True)
class SearchPlan:
    """A search before it starts.

    Attributes:
        space: What is searched.
        config: How.
        hardware: The `hardware` sections that its jobs may have.
        at_end: The metric, if no job reports it before its end.
    """

    space: Space
    config: SearchConfig
    hardware: tuple[HardwareConfig, ...]
    at_end: str = ""


def space_of(parsed: Sequence[Override]) -> Space:
    """The space that overrides span.

    Raises:
        ConfigError: They span none, or one of them cannot be searched.
    """
    fixed, dimensions = [], []
    for item in parsed:
        if item.is_sweep_override():
            dimensions.append(_dimension(item))
        else:
            fixed.append(item.input_line or "")
    if not dimensions:
        raise ConfigError(
            "hydra/sweeper=optuna needs a key to search, such as "
            "'optim.lr=tag(log, interval(0.001, 1))'"
        )
    keys = [each.key for each in dimensions]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"a key is searched once; given twice: {listed(twice)}")
    return Space(tuple(fixed), tuple(dimensions))


def _dimension(item: Override) -> Dimension:
    line = item.input_line or ""
    key, value = line.partition("=")[0], item.value()
    if unknown := sorted(set(getattr(value, "tags", ())) - {_LOG}):
        raise ConfigError(f"{line}: the only tag of a search is {_LOG!r}; got {listed(unknown)}")
    log = _LOG in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        found = _interval(key, value, log=log)
    elif isinstance(value, RangeSweep):
        found = _range(key, item, value, log=log)
    else:
        return _choice(key, item, log=log)
    if found.low > found.high or (log and found.low <= 0):
        rule = "begin above 0 for tag(log, ...)" if log else "begin below its end"
        raise ConfigError(f"{line}: it must {rule}; got {found.low:g} to {found.high:g}")
    return found


def _interval(key: str, value: IntervalSweep, *, log: bool) -> Dimension:
    assert value.start is not None, "the grammar wants both ends"
    assert value.end is not None, "the grammar wants both ends"
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    step = 1 if whole else None
    return Dimension(key, low=value.start, high=value.end, whole=whole, step=step, log=log)


def _range(key: str, item: Override, value: RangeSweep, *, log: bool) -> Dimension:
    numbers: list[Any] = sorted(item.sweep_iterator())
    if not numbers:
        raise ConfigError(f"{item.input_line}: the range holds no number")
    whole = all(isinstance(number, int) for number in numbers)
    step = abs(float(value.step))
    if log and step != 1:
        raise ConfigError(f"{item.input_line}: tag(log, range(...)) must have step 1; got {step:g}")
    return Dimension(key, low=numbers[0], high=numbers[-1], whole=whole, step=step, log=log)


def _choice(key: str, item: Override, *, log: bool) -> Dimension:
    if log:
        raise ConfigError(f"{item.input_line}: tag(log, ...) is for interval() and range()")
    try:
        choices = tuple(dict.fromkeys(item.sweep_string_iterator()))
    except Exception as error:  # Hydra and OmegaConf raise several types
        raise ConfigError(f"{item.input_line}: these values cannot be chosen from") from error
    if not choices:
        raise ConfigError(f"{item.input_line}: there is no value to choose")
    return Dimension(key, choices=choices)
