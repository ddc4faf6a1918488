"""What a job is: the whole of the interface between a job and the runner.

A job says what is trained; the runner decides how. A job therefore never names a device,
never calls `backward`, and never loops over steps.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

Arrays = dict[str, npt.NDArray[Any]]
Decode = Callable[[npt.NDArray[np.int64]], str]
Batch = Mapping[str, Tensor]
Sharding = Mapping[str, "tuple[str | None, ...]"]


class DataError(Exception):
    """Data is missing or broken. The message names the file or folder."""


class SettingError(Exception):
    """A setting under `model` or `data.options` breaks a rule. The message names the key."""


class Source(Protocol):
    """Examples with random access; the runner decides order and batches."""

    def __len__(self) -> int:
        """How many examples there are."""

    def batch(self, indices: npt.NDArray[np.int64], *, rng: np.random.Generator | None) -> Arrays:
        """The examples at `indices`, stacked: new arrays of shape [len(indices), ...].

        Args:
            indices: Positions of the examples, each in [0, len(self)).
            rng: Randomness for augmentation, a function of seed and step; None when
                evaluating, where nothing may be random.

        Raises:
            DataError: An example cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples to train on, examples held out, and what a model must know of them.

    Attributes:
        train: Examples to train on.
        heldout: Examples to evaluate on, or None.
        facts: What a model must know of the data, such as {"classes": 10}.
        decode: The text of token numbers, [n], for people; None where the data is no text.
    """

    train: Source
    heldout: Source | None
    facts: Mapping[str, int]
    decode: Decode | None = None


@dataclasses.dataclass(frozen=True)
class DataRequest:
    """What a data source is asked for: `data.root`, `data.options`, `data.workers`, `seed`."""

    root: str | None
    options: Mapping[str, Any]
    workers: int
    seed: int


class Job(abc.ABC):
    """A model, its loss and its held-out metrics.

    Args:
        settings: The configuration's `model` section.
        facts: `Dataset.facts` of the chosen data.

    Attributes:
        sharding: How parameters are cut over a mesh of devices: a regular expression, searched
            for in the parameter's name, -> for each dimension "fsdp", "tensor" or None. The
            first that is found counts; a parameter without one is whole on every device.

    Raises:
        SettingError: A setting breaks a rule.
    """

    sharding: ClassVar[Sharding] = {}

    def __init__(self, settings: Mapping[str, Any], facts: Mapping[str, int]) -> None:
        self.settings = settings
        self.facts = facts

    def fact(self, name: str) -> int:
        """What the data says under `name`.

        Raises:
            SettingError: The data is of another kind and does not say.
        """
        if name not in self.facts:
            known = ", ".join(self.facts) or "nothing"
            raise SettingError(
                f"data must suit the job: {type(self).__name__} needs the data's {name!r}, and "
                f"this data tells {known}; choose another data="
            )
        return self.facts[name]

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """A new model on the host, its weights drawn from torch's global generator."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar; `model` is in training mode."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Held-out metrics, each of shape [batch]: one value an example.

        The runner averages them over all examples, each counted once; `model` is in
        evaluation mode. "predicted", if given, is no metric: what the model says of each
        example, [batch, ...], of which `show` is handed the first few.
        """

    def show(
        self, batch: Arrays, predicted: npt.NDArray[Any], *, decode: Decode | None
    ) -> Mapping[str, str | npt.NDArray[np.uint8]]:
        """Held-out examples and what the model says of them, to be looked at in TensorBoard.

        Args:
            batch: The first few held-out examples.
            predicted: `evaluate`'s "predicted" for them.
            decode: `Dataset.decode`.

        Returns:
            By name: text in Markdown, or an image of shape [height, width, 3].
        """
        return {}

    def parameter_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Parameter groups for the optimizer: {"params": [...], further options}.

        A group's "lr_scale" multiplies the scheduled learning rate.
        """
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def tokens_per_example(self) -> int:
        """Tokens in one example of a text job, for `throughput/tokens_per_s`; else 0."""
        return 0


def weight_decay_groups(model: nn.Module) -> Sequence[Mapping[str, Any]]:
    """Two parameter groups: matrices and kernels with weight decay, norms and biases without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def setting(settings: Mapping[str, Any], key: str, choices: Sequence[Any]) -> Any:
    """The value of `settings[key]`, which must be one of `choices`.

    Raises:
        SettingError: It is not.
    """
    value = settings[key]
    if value not in choices:
        allowed = ", ".join(str(choice) for choice in choices)
        raise SettingError(f"model.{key} must be one of {allowed}; got {value!r}")
    return value


def whole(settings: Mapping[str, Any], key: str, *, least: int, section: str = "model") -> int:
    """The value of `settings[key]`, which must be a whole number, `least` or more.

    Raises:
        SettingError: It is not.
    """
    value = settings[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SettingError(f"{section}.{key} must be a whole number >= {least}; got {value!r}")
    return value


def fraction(settings: Mapping[str, Any], key: str, *, section: str = "model") -> float:
    """The value of `settings[key]`, which must be a number in [0, 1).

    Raises:
        SettingError: It is not.
    """
    value = settings[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise SettingError(f"{section}.{key} must be a number in [0, 1); got {value!r}")
    return float(value)


def positive(settings: Mapping[str, Any], key: str, *, section: str = "model") -> float:
    """The value of `settings[key]`, which must be a finite number above 0.

    Raises:
        SettingError: It is not.
    """
    value = settings[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise SettingError(f"{section}.{key} must be a finite number above 0; got {value!r}")
    return float(value)


__all__ = [
    "Arrays",
    "Batch",
    "DataError",
    "DataRequest",
    "Dataset",
    "Decode",
    "Job",
    "SettingError",
    "Sharding",
    "Source",
    "fraction",
    "positive",
    "setting",
    "weight_decay_groups",
    "whole",
]
