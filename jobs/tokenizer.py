"""From text to token numbers: bytes, or the user's own tokenizer from a local folder."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jobs import hf
from jobs.base import DataError, Decode, SettingError

Integers = npt.NDArray[np.int64]

#: The byte that ends a document; text has none.
END_BYTE = 0
#: The token that begins a text to classify, after those of the bytes.
FIRST = 256
#: What shows for a token that stands for no byte.
NO_TEXT = "▢"


class Tokenizer(Protocol):
    """Text to numbers below `vocabulary`.

    Attributes:
        vocabulary: Number of different tokens.
        end: The token that ends a document.
        mask: The token that hides others, or None.
    """

    @property
    def vocabulary(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def mask(self) -> int | None: ...

    def encode(self, texts: Sequence[str]) -> list[Integers]:
        """Each text's tokens, without special ones."""

    def decode(self, tokens: Integers) -> str:
        """The text of tokens, for people: what is no text shows all the same."""

    def encode_sentences(self, texts: Sequence[str], *, longest: int) -> list[Integers]:
        """Each text's tokens with the special ones that a classifier wants, cut to `longest`."""


def tokenizer_from(folder: str | None) -> Tokenizer:
    """The tokenizer of a folder, or bytes.

    Args:
        folder: A folder with tokenizer.json, as transformers saves it; None for bytes.

    Raises:
        DataError: The folder holds no tokenizer that can be read, or one without an end token.
        SettingError: transformers is not installed.
    """
    if folder is None:
        return Bytes()
    path = pathlib.Path(folder).expanduser()
    if not (path / "tokenizer.json").is_file():
        raise DataError(f"{path / 'tokenizer.json'}: no such file; a tokenizer's folder has one")
    auto = hf.library().AutoTokenizer
    try:
        loaded = auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many types on a broken folder
        raise DataError(f"{path}: cannot be read as a tokenizer: {error}") from error
    ends = (loaded.eos_token_id, loaded.sep_token_id)
    end = next((token for token in ends if token is not None), None)
    if end is None:
        raise DataError(f"{path}: its tokenizer must have an eos_token or a sep_token")
    return Folder(loaded, end)


def decoder(folder: str | None) -> Decode:
    """The `decode` of a tokenizer that is read when it is first asked; numbers if it is gone."""

    @functools.cache
    def found() -> Tokenizer | None:
        try:
            return tokenizer_from(folder)
        except (DataError, SettingError):
            return None

    def decode(tokens: Integers) -> str:
        tokenizer = found()
        return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens)

    return decode


@dataclasses.dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes as tokens; a document ends with a zero."""

    vocabulary: int = FIRST
    end: int = END_BYTE
    mask: int | None = None

    def encode(self, texts: Sequence[str]) -> list[Integers]:
        """See `Tokenizer.encode`."""
        return [_bytes(text).astype(np.int64) for text in texts]

    def decode(self, tokens: Integers) -> str:
        """See `Tokenizer.decode`: a character a byte, so that lines of tokens stand in line."""
        return "".join(chr(token) if token < FIRST else NO_TEXT for token in tokens)

    def encode_sentences(self, texts: Sequence[str], *, longest: int) -> list[Integers]:
        """See `Tokenizer.encode_sentences`: a first token of its own, then the bytes."""
        return [np.append(FIRST, _bytes(text)[: longest - 1]).astype(np.int64) for text in texts]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A tokenizer of transformers."""

    loaded: Any
    end: int

    @property
    def vocabulary(self) -> int:
        """Number of different tokens, added ones included."""
        return len(self.loaded)

    @property
    def mask(self) -> int | None:
        """The token that hides others, or None."""
        token: int | None = self.loaded.mask_token_id
        return token

    def encode(self, texts: Sequence[str]) -> list[Integers]:
        """See `Tokenizer.encode`."""
        # Not verbose: text longer than the model's window is what we want.
        found = self.loaded(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(tokens, dtype=np.int64) for tokens in found]

    def decode(self, tokens: Integers) -> str:
        """See `Tokenizer.decode`."""
        text: str = self.loaded.decode(tokens.tolist())
        return text

    def encode_sentences(self, texts: Sequence[str], *, longest: int) -> list[Integers]:
        """See `Tokenizer.encode_sentences`."""
        found = self.loaded(list(texts), truncation=True, max_length=longest)["input_ids"]
        return [np.array(tokens, dtype=np.int64) for tokens in found]


def _bytes(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(errors="replace"), dtype=np.uint8)
