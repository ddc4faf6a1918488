"""Text data of the user's: files tokenized as a run starts, or once and for all before.

A folder of tokens has train.bin and perhaps val.bin, token numbers one after the other, and
tokens.json, which says what they are and is written last. The files are memory-mapped.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.base import DataError, DataRequest, Dataset
from jobs.documents import Piece, find_files, read_pieces
from jobs.text import HELDOUT_FRACTION, Corpus, examples
from jobs.tokenizer import Integers, Tokenizer, decoder, tokenizer_from

DESCRIPTION = "tokens.json"
FORMAT = 1
DTYPES = ("uint8", "uint16", "uint32")
PIECES_AT_A_TIME = 256
HELDOUT_NAMES = ("val", "validation", "test")


def text(request: DataRequest) -> Dataset:
    """The user's .txt and .jsonl files, tokenized in memory: for up to some 100 MB.

    `data.root` is a file, or a folder that is read with everything below it; folders root/train
    and root/val (or "validation", "test") are taken as such, else the last tenth is held out.
    Options: `tokenizer`, a folder, or null for bytes; `field`, where the text stands in a line of
    JSON; and those of `jobs.text.examples`.

    Raises:
        DataError: The root is not set or has no text, or a file or the tokenizer is broken.
        SettingError: An option breaks a rule.
    """
    root = _root(request, "text", "/path/to/text")
    tokenizer = tokenizer_from(request.options["tokenizer"])
    field = request.options["field"]
    held = next((root / name for name in HELDOUT_NAMES if (root / name).is_dir()), None)
    whole = _in_memory(root / "train" if held else root, field=field, tokenizer=tokenizer)
    if held is None:
        train, heldout, heldout_bytes = whole.split(HELDOUT_FRACTION)
    else:
        apart = _in_memory(held, field=field, tokenizer=tokenizer)
        train, heldout, heldout_bytes = whole.tokens, apart.tokens, apart.sizes[-1]
    corpus = Corpus(
        train,
        heldout,
        vocabulary=tokenizer.vocabulary,
        heldout_bytes=heldout_bytes,
        mask_token=tokenizer.mask,
        decode=tokenizer.decode,
    )
    return examples(corpus, request)


def tokens(request: DataRequest) -> Dataset:
    """A folder that `scripts/tokenize` made, memory-mapped: of any size.

    Options: see `jobs.text.examples`.

    Raises:
        DataError: The root is not set, or the folder is missing, incomplete or broken.
        SettingError: An option breaks a rule.
    """
    root = _root(request, "tokens", "/path/to/tokens (scripts/tokenize makes it)")
    about = _read_description(root / DESCRIPTION)
    parts: dict[str, Any] = about["parts"]
    corpus = Corpus(
        _mapped(root / "train.bin", about["dtype"], parts["train"]["tokens"]),
        _mapped(root / "val.bin", about["dtype"], parts["val"]["tokens"])
        if "val" in parts
        else None,
        vocabulary=about["vocabulary"],
        heldout_bytes=parts["val"]["bytes"] if "val" in parts else 0,
        mask_token=about["mask"],
        decode=decoder(about.get("tokenizer")),
    )
    return examples(corpus, request)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A stream of tokens and what they stand for.

    Attributes:
        tokens: [tokens].
        counts: Tokens up to the end of each piece of text.
        sizes: Bytes of text up to there.
    """

    tokens: npt.NDArray[Any]
    counts: Sequence[int]
    sizes: Sequence[int]

    def split(self, fraction: float) -> tuple[Integers, Integers, int]:
        """All but the last part, the last part, and the bytes of text that it stands for.

        Within a piece, bytes are shared out evenly among its tokens.
        """
        cut = len(self.tokens) - int(len(self.tokens) * fraction)
        before = np.interp(cut, [0, *self.counts], [0, *self.sizes])
        return self.tokens[:cut], self.tokens[cut:], self.sizes[-1] - round(float(before))


def encoded(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Integers, int]]:
    """Each piece's tokens, with the end token where a document ends, and its bytes of text."""
    waiting = iter(pieces)
    while group := list(itertools.islice(waiting, PIECES_AT_A_TIME)):
        found = tokenizer.encode([piece.text for piece in group])
        for piece, numbers in zip(group, found, strict=True):
            if piece.ends:
                numbers = np.append(numbers, tokenizer.end)
            yield numbers, len(piece.text.encode(errors="replace"))


def _in_memory(path: pathlib.Path, *, field: str, tokenizer: Tokenizer) -> Encoded:
    parts = list(encoded(read_pieces(find_files(path), field=field), tokenizer))
    if not parts:
        raise DataError(f"{path}: has no text")
    counts = list(itertools.accumulate(len(numbers) for numbers, _ in parts))
    sizes = list(itertools.accumulate(size for _, size in parts))
    return Encoded(np.concatenate([numbers for numbers, _ in parts]), counts, sizes)


def _root(request: DataRequest, name: str, example: str) -> pathlib.Path:
    if request.root is None:
        raise DataError(f"data={name} needs your data: set data.root={example}")
    return pathlib.Path(request.root).expanduser()


def _read_description(path: pathlib.Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read; scripts/tokenize writes it: {error}") from error
    try:
        numbers = (about["vocabulary"], *(part["tokens"] for part in about["parts"].values()))
        right = about["format"] == FORMAT and about["dtype"] in DTYPES and "train" in about["parts"]
        right = right and all(isinstance(number, int) for number in numbers)
    except (KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise DataError(f"{path}: does not describe tokens of format {FORMAT}")
    return dict(about)


def _mapped(path: pathlib.Path, dtype: str, count: int) -> npt.NDArray[Any]:
    try:
        size = path.stat().st_size
        wanted = count * np.dtype(dtype).itemsize
        if size != wanted:
            raise DataError(f"{path}: must have {wanted} bytes, {count} {dtype}; it has {size}")
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be mapped: {error}") from error
