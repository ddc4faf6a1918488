"""`scripts/tokenize`: text files to a folder of tokens, of any size, for data=tokens.

See `jobs.tokens` for the folder's format. The text is read, tokenized and written piece by
piece.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jobs.base import DataError, SettingError
from jobs.documents import find_files, read_pieces
from jobs.tokenizer import Integers, tokenizer_from
from jobs.tokens import DESCRIPTION, DTYPES, FORMAT, Encoded, encoded

CONFIGURATION_EXIT, DATA_EXIT = 64, 65


def main(arguments: Sequence[str]) -> int:
    """Tokenize what the arguments name and return the exit code."""
    options = vars(_parser().parse_args(arguments))
    try:
        about = tokenize(options.pop("inputs"), **options)
    except SettingError as error:
        print(f"tokenize: {error}", file=sys.stderr)
        return CONFIGURATION_EXIT
    except DataError as error:
        print(f"tokenize: {error}", file=sys.stderr)
        return DATA_EXIT
    for name, part in about["parts"].items():
        print(f"{name}: {part['tokens']:,} tokens of {part['bytes']:,} bytes of text")
    print(f"python -m runner job=gpt data=tokens data.root={shlex.quote(str(options['out']))}")
    return 0


def tokenize(
    inputs: Sequence[pathlib.Path],
    *,
    out: pathlib.Path,
    tokenizer: str | None,
    field: str,
    heldout: float,
) -> dict[str, Any]:
    """Write train.bin, val.bin and tokens.json.

    Args:
        inputs: Text files, and folders that are read with everything below them, in order.
        out: The folder to write; it must not hold tokens yet.
        tokenizer: A tokenizer's folder, or None for bytes.
        field: Where the text stands in a line of JSON.
        heldout: Part of the tokens, from the end, that goes to val.bin; in [0, 1).

    Returns:
        What tokens.json says.

    Raises:
        DataError: An input or the tokenizer is missing or broken, or the folder is taken.
        SettingError: A setting breaks a rule, or transformers is not installed.
    """
    if not 0 <= heldout < 1:
        raise SettingError(f"--heldout must be a number in [0, 1); got {heldout}")
    if (out / DESCRIPTION).exists():
        raise DataError(f"{out / DESCRIPTION}: is there already; choose another --out")
    numbers = tokenizer_from(tokenizer)
    dtype = next(name for name in DTYPES if np.iinfo(name).max >= numbers.vocabulary - 1)
    pieces = read_pieces([file for path in inputs for file in find_files(path)], field=field)
    about = {
        "format": FORMAT,
        "dtype": dtype,
        "vocabulary": numbers.vocabulary,
        "end": numbers.end,
        "mask": numbers.mask,
        "tokenizer": tokenizer,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = _write_stream(out / "train.bin", encoded(pieces, numbers), dtype=dtype)
        about["parts"] = _cut(stream, out, heldout=heldout)
        _commit(out / DESCRIPTION, json.dumps(about, indent=2))
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}") from error
    return about


def _write_stream(
    path: pathlib.Path, parts: Iterable[tuple[Integers, int]], *, dtype: str
) -> Encoded:
    counts, sizes = [0], [0]
    with path.open("wb") as file:
        for numbers, size in parts:
            file.write(numbers.astype(dtype).tobytes())
            counts.append(counts[-1] + len(numbers))
            sizes.append(sizes[-1] + size)
    if counts[-1] == 0:
        raise DataError("the inputs have no text")
    return Encoded(np.memmap(path, dtype=dtype, mode="r"), counts, sizes)


def _cut(stream: Encoded, out: pathlib.Path, *, heldout: float) -> dict[str, dict[str, int]]:
    """Move the end of train.bin to val.bin and describe both."""
    train, held, held_bytes = stream.split(heldout)
    parts = {"train": {"tokens": len(train), "bytes": stream.sizes[-1] - held_bytes}}
    if len(held):
        held.tofile(out / "val.bin")
        parts["val"] = {"tokens": len(held), "bytes": held_bytes}
    os.truncate(out / "train.bin", train.nbytes)
    return parts


def _commit(path: pathlib.Path, content: str) -> None:
    """Write a file that is there whole or not at all, after all that it speaks of."""
    for file in path.parent.glob("*.bin"):
        with file.open("rb") as written:
            os.fsync(written.fileno())
    temporary = path.with_suffix(".partial")
    with temporary.open("w") as described:
        described.write(content)
        described.flush()
        os.fsync(described.fileno())
    os.replace(temporary, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenize", description="Text files to memory-mapped tokens, for data=tokens."
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=pathlib.Path,
        metavar="INPUT",
        help=".txt (a document each), .jsonl (a document a line), or a folder of them",
    )
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, metavar="FOLDER", help="the folder to write"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="a folder with tokenizer.json, as transformers saves it; default: bytes",
    )
    parser.add_argument(
        "--field", default="text", help="where the text stands in a line of JSON (text)"
    )
    parser.add_argument(
        "--heldout",
        type=float,
        default=0.01,
        metavar="PART",
        help="part of the tokens, from the end, that is held out (0.01)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
