"""Examples for masked language models: some tokens hidden, to be told from the others.

Source: Devlin et al., "BERT: Pre-training of deep bidirectional transformers", 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.base import Arrays, SettingError, Source, fraction

#: Of the chosen tokens, these parts become the mask token and a random token; the rest stays.
HIDDEN, RANDOM = 0.8, 0.1


def masked_tokens(options: Mapping[str, Any], seq_len: int) -> int:
    """How many tokens of each example are chosen: `mask_fraction` of them.

    Raises:
        SettingError: The fraction breaks a rule.
    """
    part = fraction(options, "mask_fraction", section="data.options")
    count = round(part * seq_len)
    if part > 0 and count == 0:
        raise SettingError(
            f"data.options.mask_fraction must choose at least one of {seq_len} tokens, or be 0; "
            f"got {part}"
        )
    return count


@dataclasses.dataclass(frozen=True)
class MaskedSource:
    """Another source's tokens with `count` of each example chosen, to be predicted.

    A batch is {"tokens": int64 [n, seq_len], "chosen": bool [n, seq_len], "target": int64 [n,
    seq_len]}, the target being the tokens as they were. When evaluating, an example's choice is
    always the same.

    Attributes:
        source: Where whole tokens come from.
        count: Tokens to choose in each example.
        mask: The token that hides others.
        vocabulary: Random tokens are below this.
    """

    source: Source
    count: int
    mask: int
    vocabulary: int

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: npt.NDArray[np.int64], *, rng: np.random.Generator | None) -> Arrays:
        """The examples at `indices`, masked."""
        whole = self.source.batch(indices, rng=rng)["tokens"]
        draws, random = self._draw(indices, whole.shape[1], rng)
        order = draws[0].argsort(axis=1, kind="stable")
        chosen = np.zeros(whole.shape, dtype=bool)
        np.put_along_axis(chosen, order[:, : self.count], True, axis=1)
        hidden = chosen & (draws[1] < HIDDEN)
        other = chosen & (draws[1] >= 1 - RANDOM)
        tokens = np.where(hidden, self.mask, np.where(other, random, whole))
        return {"tokens": tokens, "chosen": chosen, "target": whole}

    def _draw(
        self, indices: npt.NDArray[np.int64], length: int, rng: np.random.Generator | None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        if rng is not None:
            shape = (len(indices), length)
            return rng.random((2, *shape)), rng.integers(self.vocabulary, size=shape)
        each = [np.random.default_rng(index) for index in indices]
        draws = np.stack([own.random((2, length)) for own in each], axis=1)
        return draws, np.stack([own.integers(self.vocabulary, size=length) for own in each])
