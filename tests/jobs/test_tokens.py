"""The user's own text: files, tokenizers, `scripts/tokenize`, memory-mapped tokens, and faults."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from jobs import tokenize
from jobs.base import DataError, DataRequest, Dataset, SettingError
from jobs.documents import PIECE_CHARACTERS, find_files, read_pieces
from jobs.text import WindowSource
from jobs.tokenizer import tokenizer_from
from jobs.tokens import text, tokens
from tests.jobs import folders

STORIES = [f"Story {number}: the cat sat on mat number {number}. \u00e9\n" for number in range(50)]
ROOT = pathlib.Path(__file__).parents[2]


def request(root: pathlib.Path | None, **options: object) -> DataRequest:
    defaults = {"tokenizer": None, "field": "text", "seq_len": 16, "mask_fraction": 0.0}
    return DataRequest(
        root=None if root is None else str(root),
        options={**defaults, **options},
        workers=1,
        seed=0,
    )


def stream(part: object) -> list[int]:
    assert isinstance(part, WindowSource)
    return part.tokens.tolist()


def whole(data: Dataset) -> bytes:
    return bytes(stream(data.train) + stream(data.heldout))


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a space in its name: two text files, and JSON lines in a folder below."""
    root = tmp_path / "my text"
    (root / "more").mkdir(parents=True)
    (root / "a.txt").write_text("".join(STORIES[:10]), encoding="utf-8")
    (root / "b.txt").write_text("".join(STORIES[10:20]), encoding="utf-8")
    lines = [json.dumps({"text": story, "id": 1}) for story in STORIES[20:]]
    (root / "more" / "c.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (root / "notes.md").write_text("not read")
    (root / "._a.txt").write_bytes(b"\xff what a Mac leaves behind")
    return root


def expected_bytes() -> bytes:
    files = ["".join(STORIES[:10]), "".join(STORIES[10:20]), *STORIES[20:]]
    return b"".join(document.encode() + b"\0" for document in files)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return folders.write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bpe")


def test_text_files_become_bytes_and_each_document_ends_with_a_zero(root: pathlib.Path) -> None:
    data = text(request(root))
    assert whole(data) == expected_bytes()
    assert data.facts["vocabulary"] == 256
    held = len(stream(data.heldout))
    assert held == pytest.approx(len(expected_bytes()) / 10, abs=1)
    documents = len(STORIES) - 18
    assert data.facts["heldout_tokens"] == held
    assert data.facts["heldout_bytes"] == pytest.approx(held, abs=documents)


def test_a_single_file_is_read_too(root: pathlib.Path) -> None:
    data = text(request(root / "a.txt"))
    assert whole(data) == "".join(STORIES[:10]).encode() + b"\0"


def test_folders_named_train_and_val_are_taken_as_such(root: pathlib.Path) -> None:
    for part, stories in (("train", STORIES[:40]), ("val", STORIES[40:])):
        (root / "parts" / part).mkdir(parents=True)
        (root / "parts" / part / "all.txt").write_text("".join(stories), encoding="utf-8")
    data = text(request(root / "parts"))
    assert bytes(stream(data.train)) == "".join(STORIES[:40]).encode() + b"\0"
    assert bytes(stream(data.heldout)) == "".join(STORIES[40:]).encode() + b"\0"
    assert data.facts["heldout_bytes"] == len("".join(STORIES[40:]).encode())


def test_a_tokenizer_of_the_user_s_is_used(root: pathlib.Path, bpe: pathlib.Path) -> None:
    data = text(request(root, tokenizer=str(bpe)))
    tokenizer = tokenizer_from(str(bpe))
    numbers = stream(data.train) + stream(data.heldout)
    first = tokenizer.encode(["".join(STORIES[:10])])[0].tolist()
    assert numbers[: len(first) + 1] == [*first, tokenizer.end]
    assert numbers.count(tokenizer.end) == 32
    assert data.facts["vocabulary"] == tokenizer.vocabulary
    tokens_a_byte = data.facts["heldout_tokens"] / data.facts["heldout_bytes"]
    assert tokens_a_byte == pytest.approx(len(numbers) / len(expected_bytes()), rel=0.1)


def test_masked_text_uses_the_tokenizer_s_mask(root: pathlib.Path, bpe: pathlib.Path) -> None:
    data = text(request(root, tokenizer=str(bpe), mask_fraction=0.25))
    batch = data.train.batch(np.arange(len(data.train)), rng=np.random.default_rng(0))
    mask = tokenizer_from(str(bpe)).mask
    assert mask is not None
    assert ((batch["tokens"] == mask) <= batch["chosen"]).all()
    assert (batch["tokens"] == mask).any()
    assert data.facts["vocabulary"] == tokenizer_from(str(bpe)).vocabulary


def test_masked_bytes_have_a_mask_of_their_own(root: pathlib.Path) -> None:
    data = text(request(root, mask_fraction=0.25))
    batch = data.train.batch(np.arange(len(data.train)), rng=None)
    assert data.facts["vocabulary"] == 257
    assert data.facts["masked"] == 4
    assert batch["tokens"].max() == 256
    assert batch["target"].max() < 256


def test_tokenized_files_are_the_same_stream_memory_mapped(
    root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out" / "bytes"
    about = tokenize.tokenize([root], out=out, tokenizer=None, field="text", heldout=0.25)
    data = tokens(request(out))
    assert whole(data) == expected_bytes()
    assert isinstance(data.train, WindowSource)
    assert isinstance(data.train.tokens, np.memmap)
    assert data.train.tokens.dtype == np.uint8
    assert data.facts["heldout_tokens"] == about["parts"]["val"]["tokens"]
    assert sum(part["bytes"] for part in about["parts"].values()) == len(expected_bytes()) - 32


def test_a_window_is_read_alike_from_memory_and_from_the_file(
    root: pathlib.Path, tmp_path: pathlib.Path, bpe: pathlib.Path
) -> None:
    out = tmp_path / "bpe"
    tokenize.tokenize([root], out=out, tokenizer=str(bpe), field="text", heldout=0.1)
    mapped, memory = tokens(request(out)), text(request(root, tokenizer=str(bpe)))
    assert mapped.facts == memory.facts
    for rng in (None, 3):
        batches = [
            data.train.batch(
                np.array([2, 0]), rng=None if rng is None else np.random.default_rng(3)
            )
            for data in (mapped, memory)
        ]
        assert all((batches[0][name] == batches[1][name]).all() for name in batches[0])


def test_without_a_heldout_part_nothing_is_held_out(
    root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    tokenize.tokenize([root], out=out, tokenizer=None, field="text", heldout=0.0)
    data = tokens(request(out))
    assert data.heldout is None
    assert not (out / "val.bin").exists()


def test_the_command_line_says_what_it_wrote_and_how_to_go_on(
    root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out here"
    done = subprocess.run(
        [sys.executable, "-m", "jobs.tokenize", str(root), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout
    assert f"data=tokens data.root='{out}'" in done.stdout
    assert len(tokens(request(out)).train) > 10


def test_the_command_line_ends_with_the_runner_s_exit_codes(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokenize.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 65
    assert "none: no such file or folder" in capsys.readouterr().err
    assert tokenize.main([str(root), "--out", str(tmp_path / "o"), "--heldout", "1"]) == 64
    assert "--heldout must be" in capsys.readouterr().err


def test_a_folder_that_has_tokens_is_not_overwritten(
    root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments: dict[str, Any] = {"tokenizer": None, "field": "text", "heldout": 0.1}
    tokenize.tokenize([root], out=tmp_path / "out", **arguments)
    with pytest.raises(DataError, match=r"tokens\.json: is there already"):
        tokenize.tokenize([root], out=tmp_path / "out", **arguments)


def test_a_text_file_larger_than_a_piece_comes_in_whole_lines(tmp_path: pathlib.Path) -> None:
    lines = [f"line {number} {'x' * 80}\n" for number in range(30_000)]
    (tmp_path / "long.txt").write_text("".join(lines))
    pieces = list(read_pieces(find_files(tmp_path), field="text"))
    assert len(pieces) == 3
    assert [piece.ends for piece in pieces] == [False, False, True]
    assert all(piece.text.endswith("\n") for piece in pieces)
    assert max(len(piece.text) for piece in pieces) < PIECE_CHARACTERS + 200
    assert "".join(piece.text for piece in pieces) == "".join(lines)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json}", "has no text under 'text'"),
        ('{"body": "x"}', "has no text under 'text'"),
        ('["text"]', "has no text under 'text'"),
        ('{"text": 5}', "'text' must be text; got 5"),
    ],
)
def test_a_line_that_has_no_text_is_named(line: str, reason: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:2: {reason}"):
        text(request(tmp_path))


def test_a_file_that_is_not_utf_8_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: cannot be read as text"):
        text(request(tmp_path))


def test_roots_that_are_missing_empty_or_of_another_kind_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"set data\.root="):
        text(request(None))
    with pytest.raises(DataError, match=r"scripts/tokenize makes it"):
        tokens(request(None))
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        text(request(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"has no \.txt or \.jsonl"):
        text(request(tmp_path))
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"book\.pdf: must be one of \.txt, \.jsonl"):
        text(request(tmp_path / "book.pdf"))


def test_text_too_short_for_an_example_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SettingError, match=r"data\.options\.seq_len must be < "):
        text(request(tmp_path))


def test_folders_without_a_usable_tokenizer_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file"):
        tokenizer_from(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        tokenizer_from(str(tmp_path))


def cut(folder: pathlib.Path) -> None:
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])


def remove_part(folder: pathlib.Path) -> None:
    (folder / "val.bin").unlink()


def remove_description(folder: pathlib.Path) -> None:
    (folder / "tokens.json").unlink()


def other_format(folder: pathlib.Path) -> None:
    path = folder / "tokens.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))


def other_dtype(folder: pathlib.Path) -> None:
    path = folder / "tokens.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "object"}))


def no_json(folder: pathlib.Path) -> None:
    (folder / "tokens.json").write_text('{"format": 1')


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (cut, r"train\.bin: must have \d+ bytes"),
        (remove_part, r"val\.bin: cannot be mapped"),
        (remove_description, r"tokens\.json: cannot be read"),
        (other_format, r"tokens\.json: does not describe tokens of format 1"),
        (other_dtype, r"tokens\.json: does not describe tokens of format 1"),
        (no_json, r"tokens\.json: cannot be read"),
    ],
)
def test_a_broken_folder_of_tokens_is_a_data_error(
    breaks: Any, reason: str, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    tokenize.tokenize([root], out=out, tokenizer=None, field="text", heldout=0.1)
    breaks(out)
    with pytest.raises(DataError, match=reason):
        tokens(request(out))
