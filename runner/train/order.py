"""The order of examples: which ones make up each batch, as a function of seed and step alone.

Nothing is remembered from step to step, so a resumed run needs only its step to go on with the
very batches that it would have had. What the examples are is not known here.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from runner.record.errors import ConfigError

Indices = npt.NDArray[np.int64]


class _Stream(enum.IntEnum):
    """Random streams of a seed; each purpose draws from its own."""

    PERMUTATION = 0
    AUGMENTATION = 1


@dataclasses.dataclass
class BatchOrder:
    """Epochs of fresh permutations; the last partial batch of an epoch is dropped.

    Attributes:
        examples: Examples to draw from.
        batch_size: Examples in a batch.
        seed: What the order is a function of, together with the step.

    Raises:
        ConfigError: There are fewer examples than a batch needs.
    """

    examples: int
    batch_size: int
    seed: int
    _epoch: int = dataclasses.field(default=-1, init=False, repr=False)
    _permutation: Indices = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.examples:
            raise ConfigError(
                f"job.batch_size must be from 1 to the {self.examples} examples of the training "
                f"data, because a partial batch is never trained on; got {self.batch_size}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the examples."""
        return self.examples // self.batch_size

    def indices(self, step: int) -> Indices:
        """The examples of the update after `step` completed ones: int64 of [batch_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = self._rng(_Stream.PERMUTATION, epoch).permutation(self.examples)
            self._epoch = epoch
        start = position * self.batch_size
        return self._permutation[start : start + self.batch_size]

    def rng(self, step: int, part: int = 0) -> np.random.Generator:
        """Randomness for the augmentation of that update's batch, or of a part of it."""
        return self._rng(_Stream.AUGMENTATION, step, *([part] if part else []))

    def _rng(self, stream: _Stream, *numbers: int) -> np.random.Generator:
        return np.random.default_rng(
            np.random.SeedSequence(self.seed, spawn_key=(int(stream), *numbers))
        )
