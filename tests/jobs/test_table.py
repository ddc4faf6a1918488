"""Texts of a csv: columns, classes, padding, what is held out, and faults."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from jobs.base import DataError, DataRequest, SettingError
from jobs.bert import BertClassifier
from jobs.table import table
from tests.jobs import folders

ROWS = [(f"I {verb} it, number {n}", label) for n in range(30) for verb, label in
        (("love", "good"), ("hate", "bad"))]  # fmt: skip


def request(root: pathlib.Path | None, **options: object) -> DataRequest:
    defaults = {"text_column": "text", "label_column": "label", "tokenizer": None, "seq_len": 24}
    return DataRequest(
        root=None if root is None else str(root), options={**defaults, **options}, workers=1, seed=0
    )


def write(
    path: pathlib.Path, rows: Sequence[tuple[str, str]], head: Sequence[str] = ("text", "label")
) -> pathlib.Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def test_texts_are_bytes_after_a_first_token_padded_and_labelled(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "train.csv", [('a "b",\nc', "x"), ("\u00e9" * 30, "y"), ("", "x")])
    write(tmp_path / "val.csv", [("k", "y"), ("l", "x")])
    data = table(request(tmp_path))
    batch = data.train.batch(np.arange(3), rng=None)
    assert data.facts == {"vocabulary": 257, "seq_len": 24, "classes": 2}
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert batch["tokens"][0, :9].tolist() == [256, *b'a "b",\nc']
    assert batch["tokens"][0, 9:].tolist() == [0] * 15
    assert batch["length"].tolist() == [9, 24, 1]
    assert batch["label"].tolist() == [0, 1, 0]
    assert data.heldout is not None
    assert data.heldout.batch(np.arange(2), rng=None)["label"].tolist() == [1, 0]


def test_a_tenth_of_a_single_file_is_held_out_alike_in_every_run(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "all.csv", ROWS)
    data, again = table(request(path)), table(request(path))
    assert data.heldout is not None
    assert again.heldout is not None
    assert (len(data.train), len(data.heldout)) == (54, 6)
    tokens = [d.heldout.batch(np.arange(6), rng=None)["tokens"] for d in (data, again) if d.heldout]
    assert (tokens[0] == tokens[1]).all()


def test_columns_have_the_names_that_the_user_says(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "t.csv", [("1", "hello"), ("0", "bye")] * 5, ("stars", "review"))
    data = table(request(path, text_column="review", label_column="stars"))
    assert data.facts["classes"] == 2
    with pytest.raises(DataError, match=r"t\.csv: has no column 'text'; it has stars, review"):
        table(request(path))


def test_a_tokenizer_adds_its_special_tokens(tmp_path: pathlib.Path) -> None:
    bpe = folders.write_tokenizer(tmp_path / "bpe")
    path = write(tmp_path / "all.csv", [*ROWS, ("long " * 100, "good")])
    data = table(request(path, tokenizer=str(bpe)))
    batch = data.train.batch(np.arange(len(data.train)), rng=None)
    rows, length = np.arange(len(data.train)), batch["length"]
    assert (batch["tokens"][:, 0] == 1).all()
    assert (batch["tokens"][rows, length - 1] == 2).all()
    assert length.max() == 24


def test_classes_that_were_not_trained_on_are_named(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "val.csv", [("so so", "middling"), ("fine", "good")])
    with pytest.raises(DataError, match=r"val\.csv: has a class .* not trained on: 'middling'"):
        table(request(tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has no column 'text'"),
        (b"text,label\n", "must have two rows or more; it has 0"),
        (b"text,label\na,b\nc\n", r":3: has too few columns"),
        (b"text,label\na,b\nc,b\n", "must have two classes or more"),
        (b'text,label\n"a,b\n', "cannot be read as csv"),
        (b"text,label\n\xff,b\n", "cannot be read as csv"),
    ],
)
def test_a_broken_table_is_a_data_error(
    content: bytes, reason: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    write(tmp_path / "val.csv", ROWS)
    with pytest.raises(DataError, match=rf"train\.csv:? ?{reason}"):
        table(request(tmp_path))


def test_a_root_that_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"set data\.root="):
        table(request(None))
    with pytest.raises(DataError, match=r"none\.csv: cannot be read"):
        table(request(tmp_path / "none.csv"))


def test_a_length_below_two_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SettingError, match=r"data\.options\.seq_len must be .* >= 2; got 1"):
        table(request(write(tmp_path / "all.csv", ROWS), seq_len=1))


def test_bert_learns_to_tell_the_classes_apart(tmp_path: pathlib.Path) -> None:
    data = table(request(write(tmp_path / "all.csv", ROWS)))
    assert data.heldout is not None
    sizes = {"vocabulary": None, "depth": 1, "width": 32, "heads": 2, "mlp_width": 64}
    torch.manual_seed(0)
    job = BertClassifier({"preset": "tiny", **sizes, "dropout": 0.0}, data.facts)
    model = job.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    arrays = data.train.batch(np.arange(len(data.train)), rng=None)
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for _ in range(80):
        optimizer.zero_grad()
        job.loss(model, batch).backward()
        optimizer.step()
    held = data.heldout.batch(np.arange(len(data.heldout)), rng=None)
    with torch.no_grad():
        metrics = job.evaluate(model.eval(), {n: torch.from_numpy(a) for n, a in held.items()})
    assert metrics["accuracy"].mean() == 1
    shown = job.show(held, metrics["predicted"].numpy(), decode=data.decode)["examples"]
    words, text, *_ = str(shown).splitlines()
    assert words == f"    {held['label'][0]}"
    assert (text.removeprefix("    ▢"), ("bad", "good")[held["label"][0]]) in ROWS
