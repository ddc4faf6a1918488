"""What jobs show of held-out examples: pictures of images, lines of text."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from jobs.bert import MaskedBert
from jobs.gpt import GPTJob
from jobs.mlp import MLP
from jobs.tokenizer import Bytes, decoder, tokenizer_from
from tests.jobs import folders

TEXT = "A line.\nThe next."


def tokens_of(text: str) -> npt.NDArray[np.int64]:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)[None]


def gpt() -> GPTJob:
    settings = {"depth": 1, "width": 16, "heads": 2, "dropout": 0.0, "positions": "rotary"}
    facts = {"vocabulary": 256, "seq_len": 12, "heldout_tokens": 1, "heldout_bytes": 1}
    return GPTJob(settings, facts)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_stand_side_by_side_and_mistakes_are_red(channels: int) -> None:
    job = MLP(
        {"width": 4, "depth": 0, "dropout": 0.0},
        {"channels": channels, "image_size": 28, "classes": 10},
    )
    image = np.random.default_rng(0).normal(size=(3, channels, 28, 28)).astype(np.float32)
    label = np.array([3, 5, 7])
    shown = job.show({"image": image, "label": label}, np.array([3, 6, 7]), decode=None)
    picture = shown["examples"]
    assert isinstance(picture, np.ndarray)
    assert picture.dtype == np.uint8
    tiles = np.split(picture, 3, axis=1)
    words = [tile[:16].astype(int) for tile in tiles]
    redness = [(pixels[..., 0] - pixels[..., 1]).max() for pixels in words]
    greenness = [(pixels[..., 1] - pixels[..., 0]).max() for pixels in words]
    assert [red > 80 for red in redness] == [False, True, False]
    assert [green > 40 for green in greenness] == [True, False, True]
    grey = tiles[0][16:, 2:-2].astype(float).mean(axis=2)[1::3, 1::3]
    assert np.corrcoef(grey.ravel(), image[0].mean(axis=0).ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("bad", "brightness"), [([np.nan], [0]), ([np.inf, -np.inf], [255, 0]), ([np.nan] * 784, [0])]
)
def test_an_image_with_what_is_no_number_is_shown(bad: list[float], brightness: list[int]) -> None:
    job = MLP(
        {"width": 4, "depth": 0, "dropout": 0.0}, {"channels": 1, "image_size": 28, "classes": 10}
    )
    image = np.random.default_rng(0).normal(size=(1, 1, 28, 28)).astype(np.float32)
    image.reshape(-1)[: len(bad)] = bad
    shown = job.show({"image": image, "label": np.array([3])}, np.array([3]), decode=None)
    picture = shown["examples"]
    assert isinstance(picture, np.ndarray)
    corner = picture[16:, 2:-2, 0][1::3, 1::3]
    assert corner.ravel()[: len(brightness)].tolist() == brightness
    assert len(bad) == 784 or corner.max() == 255


@pytest.mark.parametrize(
    ("channels", "side", "shown"), [(1, 4, 84), (4, 28, 84), (3, 100, 100), (3, 1000, 224)]
)
def test_images_of_any_size_are_shown_at_one_that_can_be_seen(
    channels: int, side: int, shown: int
) -> None:
    job = MLP({"width": 4, "depth": 0, "dropout": 0.0}, {"channels": channels, "image_size": side})
    image = np.zeros((1, channels, side, side), dtype=np.float32)
    found = job.show({"image": image, "label": np.array([0])}, np.array([0]), decode=None)
    picture = found["examples"]
    assert isinstance(picture, np.ndarray)
    assert picture.shape == (shown + 16, shown + 4, 3)


def test_text_stands_above_what_the_model_says() -> None:
    said = tokens_of("A lime.\nThe text.")
    shown = gpt().show({"target": tokens_of(TEXT)}, said, decode=Bytes().decode)
    assert shown["examples"] == "    text  | A line.·The next.\n    model | A lime.·The text.\n"


def test_without_a_tokenizer_the_numbers_are_shown() -> None:
    shown = gpt().show({"target": np.array([[5, 6]])}, np.array([[5, 7]]), decode=None)
    assert shown["examples"] == "    text  | 5 6\n    model | 5 7\n"


def test_of_masked_text_only_what_was_asked_for_is_the_models() -> None:
    target = tokens_of(TEXT)
    chosen = np.zeros_like(target, dtype=bool)
    chosen[0, [2, 4]] = True
    asked = np.where(chosen, 256, target)
    job = MaskedBert(
        {
            "preset": "tiny",
            **dict.fromkeys(("vocabulary", "depth", "width", "heads", "mlp_width")),
            "dropout": 0.0,
        },
        {"vocabulary": 257, "seq_len": 17, "masked": 2},
    )
    batch = {"target": target, "tokens": asked, "chosen": chosen}
    said = np.full_like(target, ord("x"))
    lines = str(job.show(batch, said, decode=Bytes().decode)["examples"]).splitlines()
    assert lines[:3] == [
        "    text  | A line.·The next.",
        "    asked | A ▢i▢e.·The next.",
        "    model | A xixe.·The next.",
    ]


def test_a_tokenizers_folder_decodes_and_one_that_is_gone_gives_numbers(
    tmp_path: pathlib.Path,
) -> None:
    folder = folders.write_tokenizer(tmp_path / "words")
    decode = decoder(str(folder))
    tokens = tokenizer_from(str(folder)).encode(["the cat sat"])[0]
    assert "cat" in decode(tokens)
    assert decoder(str(tmp_path / "gone"))(np.array([1, 2])) == "1 2"
    assert decoder(None)(tokens_of("abc")[0]) == "abc"


def test_evaluation_gives_the_likeliest_of_each_example() -> None:
    job, model = gpt(), gpt().build().eval()
    batch: dict[str, Any] = {"tokens": torch.randint(256, (2, 12))}
    batch["target"] = batch["tokens"]
    with torch.no_grad():
        found = job.evaluate(model, batch)["predicted"]
        assert torch.equal(found, model(batch["tokens"]).argmax(dim=2))
