"""Texts to classify, from the user's own csv: a column of texts and a column of labels.

A batch is {"tokens": int64 [n, seq_len], "length": int64 [n], "label": int64 [n]}; behind their
length tokens are zero. The table is tokenized in memory as a run starts.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jobs.base import Arrays, DataError, DataRequest, Dataset, whole
from jobs.tokenizer import FIRST, tokenizer_from

Integers = npt.NDArray[np.int64]

HELDOUT_NAMES = ("val.csv", "validation.csv", "test.csv")
HELDOUT_FRACTION = 0.1
LONGEST_FIELD = 2**30


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts and the names of their classes."""

    path: pathlib.Path
    texts: Sequence[str]
    labels: Sequence[str]


def table(request: DataRequest) -> Dataset:
    """Labelled texts: root/train.csv and root/val.csv (or "validation", "test"), or one file.

    Of one file, or where there is no second, a tenth is held out, the same in every run. Classes
    are the different labels, sorted. Options: `text_column`, `label_column`; `tokenizer`, a
    folder, or null for bytes; `seq_len`, where longer texts are cut.

    Raises:
        DataError: The root is not set or missing, or a file or the tokenizer is broken.
        SettingError: An option breaks a rule.
    """
    train, heldout = _both(request)
    classes = sorted(set(train.labels))
    if len(classes) < 2:
        raise DataError(f"{train.path}: must have two classes or more; it has {classes}")
    seq_len = whole(request.options, "seq_len", least=2, section="data.options")
    tokenizer = tokenizer_from(request.options["tokenizer"])
    sources = []
    for rows in (train, heldout):
        number = {name: place for place, name in enumerate(classes)}
        if strange := sorted(set(rows.labels) - set(classes)):
            raise DataError(f"{rows.path}: has a class that is not trained on: {strange[0]!r}")
        encoded = tokenizer.encode_sentences(rows.texts, longest=seq_len)
        labels = np.array([number[label] for label in rows.labels], dtype=np.int64)
        sources.append(_source(encoded, labels, seq_len))
    vocabulary = max(tokenizer.vocabulary, FIRST + 1)
    facts = {"vocabulary": vocabulary, "seq_len": seq_len, "classes": len(classes)}
    return Dataset(sources[0], sources[1], facts, tokenizer.decode)


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Texts in memory, padded to one length."""

    tokens: Integers
    length: Integers
    label: Integers

    def __len__(self) -> int:
        return len(self.label)

    def batch(self, indices: Integers, *, rng: np.random.Generator | None) -> Arrays:
        """The texts at `indices`; nothing is augmented."""
        return {
            "tokens": self.tokens[indices],
            "length": self.length[indices],
            "label": self.label[indices],
        }


def _source(encoded: Sequence[Integers], labels: Integers, seq_len: int) -> TextSource:
    tokens = np.zeros((len(encoded), seq_len), dtype=np.int64)
    for row, found in zip(tokens, encoded, strict=True):
        row[: len(found)] = found
    return TextSource(tokens, np.array([len(found) for found in encoded]), labels)


def _both(request: DataRequest) -> tuple[Rows, Rows]:
    if request.root is None:
        raise DataError("data=csv needs your table: set data.root=/path/to/table.csv")
    root = pathlib.Path(request.root).expanduser()
    train = _read(root / "train.csv" if root.is_dir() else root, request)
    found = next((root / name for name in HELDOUT_NAMES if (root / name).is_file()), None)
    if found is not None:
        return train, _read(found, request)
    count = len(train.texts)
    order = np.random.default_rng(0).permutation(count).tolist()
    held = max(1, int(count * HELDOUT_FRACTION))
    return _some(train, sorted(order[held:])), _some(train, sorted(order[:held]))


def _some(rows: Rows, places: Sequence[int]) -> Rows:
    texts, labels = ([column[place] for place in places] for column in (rows.texts, rows.labels))
    return Rows(rows.path, texts, labels)


def _read(path: pathlib.Path, request: DataRequest) -> Rows:
    columns = [request.options[key] for key in ("text_column", "label_column")]
    csv.field_size_limit(LONGEST_FIELD)
    texts: list[str] = []
    labels: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or ()
            for name in columns:
                if name not in names:
                    raise DataError(f"{path}: has no column {name!r}; it has {', '.join(names)}")
            for row in reader:
                text, label = (row[name] for name in columns)
                if text is None or label is None:
                    raise DataError(f"{path}:{reader.line_num}: has too few columns")
                texts.append(text)
                labels.append(label)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as csv: {error}") from error
    if len(texts) < 2:
        raise DataError(f"{path}: must have two rows or more; it has {len(texts)}")
    return Rows(path, texts, labels)
