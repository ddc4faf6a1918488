"""Text data: real English prose as bytes, and the windows that every text job trains on.

A batch is {"tokens": int64 [n, seq_len], "target": int64 [n, seq_len]}, the target being the
token that follows. A batch is a function of its indices and its `rng` alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.base import (
    Arrays,
    DataError,
    DataRequest,
    Dataset,
    Decode,
    SettingError,
    Source,
    whole,
)
from jobs.masking import MaskedSource, masked_tokens
from jobs.tokenizer import Bytes

Integers = npt.NDArray[np.int64]

BYTES = 256
HELDOUT_FRACTION = 0.1


def prose(request: DataRequest) -> Dataset:
    """About 400,000 bytes of English from the standard library: Python's language reference.

    The last tenth is held out. Paragraphs that the library repeats are kept once, so that none
    of the held-out ones was trained on. The text differs a little with Python's version.

    A token is a byte. Options: see `examples`.

    Raises:
        DataError: This Python was built without the text.
        SettingError: An option breaks a rule.
    """
    text = np.frombuffer(_read_prose().encode(), dtype=np.uint8)
    cut = len(text) - int(len(text) * HELDOUT_FRACTION)
    corpus = Corpus(
        text[:cut],
        text[cut:],
        vocabulary=BYTES,
        heldout_bytes=len(text) - cut,
        decode=Bytes().decode,
    )
    return examples(corpus, request)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as streams of token numbers, which may be memory-mapped.

    Attributes:
        train: Tokens to train on: [tokens], of any integer type.
        heldout: Tokens to evaluate on, or None.
        vocabulary: Number of different tokens.
        heldout_bytes: Bytes of text that `heldout` stands for.
        mask_token: The token that hides others, or None for one of its own after the others.
        decode: See `Dataset`.
    """

    train: npt.NDArray[Any]
    heldout: npt.NDArray[Any] | None
    vocabulary: int
    heldout_bytes: int
    mask_token: int | None = None
    decode: Decode | None = None


def examples(corpus: Corpus, request: DataRequest) -> Dataset:
    """A corpus cut into examples.

    Options: `seq_len`, tokens in an example; `mask_fraction`, see `jobs.masking`, or 0.

    Returns:
        Examples, and the facts "vocabulary", "seq_len", "masked" (tokens in each example),
        "heldout_tokens", "heldout_bytes".

    Raises:
        SettingError: An option breaks a rule, or the text is too short for one example.
    """
    seq_len = whole(request.options, "seq_len", least=1, section="data.options")
    masked = masked_tokens(request.options, seq_len)
    facts = {
        "vocabulary": corpus.vocabulary,
        "seq_len": seq_len,
        "masked": masked,
        "heldout_tokens": 0 if corpus.heldout is None else len(corpus.heldout),
        "heldout_bytes": corpus.heldout_bytes,
    }
    sources: list[Source | None] = [
        None if tokens is None else _source(tokens, seq_len)
        for tokens in (corpus.train, corpus.heldout)
    ]
    if masked:
        mask = corpus.vocabulary if corpus.mask_token is None else corpus.mask_token
        sources = [
            None if source is None else MaskedSource(source, masked, mask, corpus.vocabulary)
            for source in sources
        ]
        facts["vocabulary"] = max(corpus.vocabulary, mask + 1)
    assert sources[0] is not None
    return Dataset(sources[0], sources[1], facts, corpus.decode)


@dataclasses.dataclass(frozen=True)
class WindowSource:
    """A stream of tokens cut into windows that do not overlap; the rest at its end is unused.

    When training, each window is shifted by up to its own length, so that over the epochs every
    token is seen at every position.
    """

    tokens: npt.NDArray[Any]
    seq_len: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def batch(self, indices: Integers, *, rng: np.random.Generator | None) -> Arrays:
        """The windows at `indices`; `rng` shifts them."""
        starts = indices * self.seq_len
        if rng is not None:
            shifted = starts + rng.integers(self.seq_len, size=len(starts))
            starts = np.minimum(shifted, len(self.tokens) - self.seq_len - 1)
        cut = self.tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)
        return {"tokens": cut[:, :-1].copy(), "target": cut[:, 1:].copy()}


def _source(tokens: npt.NDArray[Any], seq_len: int) -> WindowSource:
    source = WindowSource(tokens, seq_len)
    if len(source) < 1:
        raise SettingError(
            f"data.options.seq_len must be < {len(tokens)}, the tokens of the text, because each "
            f"position needs the token that follows; got {seq_len}"
        )
    return source


def _read_prose() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "data=prose needs pydoc_data.topics of Python's standard library, which this Python "
            f"was built without: {error}"
        ) from error
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))
