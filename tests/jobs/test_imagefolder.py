"""The user's own folder of images: real files, whole and broken."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from PIL import Image

from jobs.base import DataError, DataRequest, Dataset, SettingError
from jobs.images import FOLDER_MEAN, FOLDER_STD, imagefolder

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 4


def request(root: pathlib.Path | None, *, workers: int = 2, size: int = 16) -> DataRequest:
    return DataRequest(
        root=None if root is None else str(root),
        options={"image_size": size},
        workers=workers,
        seed=0,
    )


def save_image(path: pathlib.Path, seed: int, *, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder as ImageNet's, with a space and a quote in its name."""
    root = tmp_path / "my 'images'"
    for part_number, part in enumerate(("train", "val")):
        for label, name in enumerate(CLASSES):
            for number in range(PER_CLASS):
                suffix = (".jpg", ".JPEG", ".png")[number % 3]
                seed = 100 * part_number + 10 * label + number
                save_image(root / part / name / f"{number}{suffix}", seed)
    return root


def all_of(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    batch = data.train.batch(np.arange(len(data.train)), rng=None)
    return batch["image"], batch["label"]


def test_every_image_is_found_and_labelled_by_its_folder(root: pathlib.Path) -> None:
    data = imagefolder(request(root))
    images, labels = all_of(data)
    assert data.facts == {"classes": 3, "channels": 3, "image_size": 16}
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.shape == (12, 3, 16, 16)
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert data.heldout is not None
    assert len(data.heldout) == 12


def test_images_in_folders_below_a_class_belong_to_it(root: pathlib.Path) -> None:
    save_image(root / "train" / "bee" / "images" / "deep.png", 7)
    _, labels = all_of(imagefolder(request(root)))
    assert np.bincount(labels).tolist() == [4, 5, 4]


def test_files_that_are_no_images_are_left_alone(root: pathlib.Path) -> None:
    (root / "train" / "ant" / "boxes.txt").write_text("1 2 3")
    (root / "train" / "ant" / "._0.jpg").write_bytes(b"what a Mac leaves behind")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "README").write_text("about")
    assert len(imagefolder(request(root)).train) == 12


def test_a_grey_image_and_one_with_alpha_become_three_channels(tmp_path: pathlib.Path) -> None:
    for name, mode in (("grey", "L"), ("alpha", "RGBA"), ("palette", "P")):
        path = tmp_path / "train" / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.new(mode, (20, 20), 128 if mode != "RGBA" else (128, 128, 128, 255)).save(path)
    images, _ = all_of(imagefolder(request(tmp_path)))
    assert images.shape == (3, 3, 16, 16)


def test_pixels_are_normalised_as_for_imagenet(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train" / "one" / "0.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (50, 20), (255, 0, 51)).save(path)
    image = all_of(imagefolder(request(tmp_path)))[0][0]
    expected = (np.array([1.0, 0.0, 0.2], dtype=np.float32) - FOLDER_MEAN) / FOLDER_STD
    np.testing.assert_allclose(image, np.broadcast_to(expected[:, None, None], image.shape), 1e-5)


def test_evaluation_takes_the_centre(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train" / "one" / "0.png"
    path.parent.mkdir(parents=True)
    picture = np.zeros((64, 128, 3), dtype=np.uint8)
    picture[:, 32:96] = 255  # the central square is white, all else is black
    Image.fromarray(picture).save(path)
    image = all_of(imagefolder(request(tmp_path)))[0][0]
    np.testing.assert_allclose(image[:, :, 1:-1].min(axis=(1, 2)), (1 - FOLDER_MEAN) / FOLDER_STD)


def test_training_crops_and_mirrors(root: pathlib.Path) -> None:
    source = imagefolder(request(root)).train
    indices = np.zeros(8, dtype=np.int64)
    views = source.batch(indices, rng=np.random.default_rng(0))["image"]
    assert len({view.tobytes() for view in views}) == 8


def test_half_of_the_training_views_are_mirrored(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train" / "one" / "0.png"
    path.parent.mkdir(parents=True)
    slope = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
    Image.fromarray(slope.copy()).save(path)
    source = imagefolder(request(tmp_path)).train
    views = source.batch(np.zeros(200, dtype=np.int64), rng=np.random.default_rng(0))["image"]
    mirrored = (views[:, 0, 8, 0] > views[:, 0, 8, -1]).mean()
    assert 0.35 < mirrored < 0.65


@pytest.mark.parametrize("shape", [(400, 4), (4, 400), (1, 1)])
def test_an_image_of_any_shape_can_be_cropped(
    shape: tuple[int, int], tmp_path: pathlib.Path
) -> None:
    save_image(tmp_path / "train" / "one" / "0.png", 0, width=shape[0], height=shape[1])
    source = imagefolder(request(tmp_path)).train
    views = source.batch(np.zeros(20, dtype=np.int64), rng=np.random.default_rng(0))["image"]
    assert views.shape == (20, 3, 16, 16)
    assert np.isfinite(views).all()


def test_augmentation_does_not_depend_on_the_number_of_threads(root: pathlib.Path) -> None:
    indices = np.random.default_rng(0).integers(12, size=64)
    one, four, again = (
        imagefolder(request(root, workers=workers)).train.batch(
            indices, rng=np.random.default_rng(5)
        )["image"]
        for workers in (1, 4, 4)
    )
    assert (one == four).all()
    assert (four == again).all()


def test_classes_and_files_come_in_sorted_order(root: pathlib.Path) -> None:
    images, labels = all_of(imagefolder(request(root)))
    again, labels_again = all_of(imagefolder(request(root)))
    assert (images == again).all()
    assert (labels == labels_again).all()


@pytest.mark.parametrize("name", ["validation", "test"])
def test_the_heldout_folder_has_other_names_too(name: str, root: pathlib.Path) -> None:
    (root / "val").rename(root / name)
    assert imagefolder(request(root)).heldout is not None


def test_without_a_heldout_folder_nothing_is_held_out(root: pathlib.Path) -> None:
    (root / "val").rename(root / "somewhere else")
    assert imagefolder(request(root)).heldout is None


def test_a_root_that_is_not_set_says_how_to_set_it() -> None:
    with pytest.raises(DataError, match=r"set data\.root="):
        imagefolder(request(None))


def test_a_missing_root_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        imagefolder(request(tmp_path / "nowhere"))


def test_a_root_that_is_a_file_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "images.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"images\.tar: is not a folder"):
        imagefolder(request(tmp_path / "images.tar"))


def test_a_root_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="loop"):
        imagefolder(request(tmp_path / "loop"))
    with pytest.raises(DataError, match="longlong"):
        imagefolder(request(tmp_path / ("long" * 100)))


def test_a_root_without_train_is_a_data_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="train: no such folder"):
        imagefolder(request(tmp_path))


def test_an_empty_train_folder_is_a_data_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: is empty"):
        imagefolder(request(tmp_path))


def test_a_class_without_images_is_named(root: pathlib.Path) -> None:
    for path in (root / "val" / "bee").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"val/bee: has no image"):
        imagefolder(request(root))


@pytest.mark.parametrize(("part", "name"), [("train", "dog"), ("val", "elk")])
def test_parts_that_differ_in_classes_are_a_data_error(
    part: str, name: str, root: pathlib.Path
) -> None:
    save_image(root / part / name / "0.png", 0)
    with pytest.raises(DataError, match=f"train and val differ in classes, such as {name}"):
        imagefolder(request(root))


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_text(path: pathlib.Path) -> None:
    path.write_text("this is no image")


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def dangle(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone")


def loop(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("number", [0, 2], ids=["jpeg", "png"])
@pytest.mark.parametrize("breaks", [truncate, replace_by_text, empty, dangle, loop])
@pytest.mark.parametrize("training", [True, False])
def test_a_broken_image_is_a_data_error_that_names_the_file(
    breaks: object, number: int, training: bool, root: pathlib.Path
) -> None:
    path = root / "train" / "bee" / ("0.jpg", "", "2.png")[number]
    assert callable(breaks)
    breaks(path)
    source = imagefolder(request(root)).train
    with pytest.raises(DataError, match=f"bee/{path.name}: cannot be read as an image"):
        source.batch(np.arange(12), rng=np.random.default_rng(0) if training else None)


def test_an_image_that_vanishes_while_training_is_named(root: pathlib.Path) -> None:
    source = imagefolder(request(root)).train
    (root / "train" / "cat" / "1.JPEG").unlink()
    with pytest.raises(DataError, match=r"cat/1\.JPEG"):
        source.batch(np.arange(12), rng=None)


def test_a_source_works_on_after_a_broken_image(root: pathlib.Path) -> None:
    truncate(root / "train" / "ant" / "0.jpg")
    source = imagefolder(request(root)).train
    with pytest.raises(DataError):
        source.batch(np.arange(12), rng=None)
    assert len(source.batch(np.arange(1, 12), rng=None)["label"]) == 11


def test_no_workers_are_a_setting_error(root: pathlib.Path) -> None:
    with pytest.raises(SettingError, match=r"data\.workers must be >= 1; got 0"):
        imagefolder(request(root, workers=0))
