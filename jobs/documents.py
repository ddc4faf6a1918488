"""Documents out of text files and JSON lines, read piece by piece: a file may exceed memory."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence

from jobs.base import DataError

SUFFIXES = (".txt", ".jsonl")
PIECE_CHARACTERS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        text: Whole lines of it.
        ends: Whether the document ends here.
    """

    text: str
    ends: bool


def find_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The text file itself, or every text file below a folder, in the order of their names.

    Raises:
        DataError: There is none.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: must be one of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if not found:
        raise DataError(f"{path}: has no {' or '.join(SUFFIXES)}")
    return found


def read_pieces(files: Sequence[pathlib.Path], *, field: str) -> Iterator[Piece]:
    """The documents of files: each .txt is one, and each line of a .jsonl.

    Args:
        files: What to read, in order.
        field: Where the text stands in a line of JSON.

    Raises:
        DataError: A file cannot be read, or a line has no text under `field`.
    """
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _json_lines(file, field)
            else:
                yield from _text(file)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as text: {error}") from error


def _text(file: pathlib.Path) -> Iterator[Piece]:
    with file.open(encoding="utf-8") as lines:
        waiting: str | None = None
        while read := lines.readlines(PIECE_CHARACTERS):
            if waiting is not None:
                yield Piece(waiting, ends=False)
            waiting = "".join(read)
    if waiting is not None:
        yield Piece(waiting, ends=True)


def _json_lines(file: pathlib.Path, field: str) -> Iterator[Piece]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{file}:{number}: has no text under {field!r}: {error}") from error
            if not isinstance(text, str):
                raise DataError(f"{file}:{number}: {field!r} must be text; got {text!r:.60}")
            yield Piece(text, ends=True)
