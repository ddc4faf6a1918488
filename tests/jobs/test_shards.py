"""Tar shards of images: equal to the same images in a folder, indexed once, whole and broken."""

from __future__ import annotations

import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from jobs.base import DataError, DataRequest, SettingError
from jobs.images import imagefolder
from jobs.shards import shards

CLASSES = 3
PER_CLASS = 4


def request(root: pathlib.Path | None, *, workers: int = 2, size: int = 16) -> DataRequest:
    return DataRequest(
        root=None if root is None else str(root),
        options={"image_size": size},
        workers=workers,
        seed=0,
    )


def image_bytes(seed: int, form: str = "PNG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, form)
    return buffer.getvalue()


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def write_shard(path: pathlib.Path, samples: dict[str, tuple[bytes, int]]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, (image, label) in samples.items():
            add(shard, f"{name}.cls", f"{label}\n".encode())
            add(shard, f"{name}.json", b"{}")
            add(shard, f"{name}.png", image)
    return path


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """Images in shards of uneven size, and the same ones, in the same order, in a folder."""
    root = tmp_path / "my 'shards'"
    for part_number, part in enumerate(("train", "val")):
        samples = {}
        for label in range(CLASSES):
            for number in range(PER_CLASS):
                content = image_bytes(100 * part_number + 10 * label + number)
                samples[f"{label}-{number}"] = content, label
                path = tmp_path / "folder" / part / f"class-{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        names = list(samples)
        for number, some in enumerate((names[:5], names[5:11], names[11:])):
            write_shard(root / f"{part}-{number:06}.tar", {name: samples[name] for name in some})
    return root


@pytest.mark.parametrize("training", [True, False])
def test_batches_equal_those_of_the_same_images_in_a_folder(
    training: bool, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    inside, outside = shards(request(root)), imagefolder(request(tmp_path / "folder"))
    assert inside.facts == outside.facts
    indices = np.array([0, 11, 5, 4, 5])
    for first, second in ((inside.train, outside.train), (inside.heldout, outside.heldout)):
        assert first is not None
        assert second is not None
        assert len(first) == len(second) == CLASSES * PER_CLASS
        got, expected = (
            source.batch(indices, rng=np.random.default_rng(3) if training else None)
            for source in (first, second)
        )
        assert all((got[name] == expected[name]).all() for name in expected)


def test_shards_may_lie_in_folders_named_after_their_part(root: pathlib.Path) -> None:
    for path in list(root.glob("*.tar")):
        part, _, rest = path.name.partition("-")
        (root / part).mkdir(exist_ok=True)
        path.rename(root / part / rest)
    data = shards(request(root))
    assert len(data.train) == 12
    assert data.heldout is not None


def test_without_a_heldout_part_nothing_is_held_out(root: pathlib.Path) -> None:
    for path in root.glob("val*.tar"):
        path.unlink()
    assert shards(request(root)).heldout is None


def test_the_index_is_kept_and_used_until_a_shard_changes(root: pathlib.Path) -> None:
    first = shards(request(root)).train.batch(np.arange(12), rng=None)
    kept = root / ".train.index.npz"
    written = kept.stat().st_mtime_ns
    again = shards(request(root)).train.batch(np.arange(12), rng=None)
    assert kept.stat().st_mtime_ns == written
    assert (first["image"] == again["image"]).all()
    write_shard(
        root / "train-000002.tar", {"new": (image_bytes(7), 1), "more": (image_bytes(8), 2)}
    )
    assert len(shards(request(root)).train) == 13
    assert kept.stat().st_mtime_ns != written


def test_an_index_that_is_broken_is_made_anew(root: pathlib.Path) -> None:
    shards(request(root))
    (root / ".train.index.npz").write_bytes(b"PK broken")
    assert len(shards(request(root)).train) == 12


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(root: pathlib.Path) -> None:
    (root / f".train.index.npz.{os.getpid()}").mkdir()
    assert len(shards(request(root)).train) == 12
    assert not (root / ".train.index.npz").exists()


def test_a_root_that_is_not_set_missing_or_without_shards_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"set data\.root="):
        shards(request(None))
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=rf"{root}: has no train\*\.tar"):
            shards(request(root))


def test_an_image_without_a_label_is_named(root: pathlib.Path) -> None:
    with tarfile.open(root / "train-000001.tar", "a") as shard:
        add(shard, "lonely.png", image_bytes(1))
    with pytest.raises(DataError, match=r"train-000001\.tar: the image lonely has no lonely\.cls"):
        shards(request(root))


def test_a_label_that_is_no_number_is_named(root: pathlib.Path) -> None:
    with tarfile.open(root / "train-000001.tar", "a") as shard:
        add(shard, "cat.cls", b"cat")
    with pytest.raises(DataError, match=r"train-000001\.tar: cat\.cls must be a class's number"):
        shards(request(root))


def test_a_shard_without_images_is_named(root: pathlib.Path) -> None:
    write_shard(root / "train-000003.tar", {})
    with pytest.raises(DataError, match=r"train-000003\.tar: has no image"):
        shards(request(root))


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200])
def test_a_file_that_is_no_tar_is_named(content: bytes, root: pathlib.Path) -> None:
    (root / "train-000001.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"train-000001\.tar: cannot be read as a tar"):
        shards(request(root))


def test_a_compressed_shard_is_refused(root: pathlib.Path) -> None:
    with tarfile.open(root / "train-000001.tar", "w:gz") as shard:
        add(shard, "x.png", image_bytes(1))
    with pytest.raises(DataError, match=r"train-000001\.tar: cannot be read as a tar"):
        shards(request(root))


def test_a_heldout_class_that_is_not_trained_on_is_refused(root: pathlib.Path) -> None:
    write_shard(root / "val-000003.tar", {"x": (image_bytes(1), CLASSES)})
    with pytest.raises(DataError, match="the held-out part has the class 3"):
        shards(request(root))


def test_a_shard_that_vanishes_or_shrinks_while_training_is_named(root: pathlib.Path) -> None:
    source = shards(request(root)).train
    path = root / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"train-000001\.tar at byte [\d,]+: cannot be read as an"):
        source.batch(np.array([5]), rng=None)
    path.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: cannot be read"):
        source.batch(np.array([5]), rng=None)
    assert source.batch(np.array([0, 11]), rng=None)["label"].tolist() == [0, 2]


def test_settings_that_break_a_rule_are_named(root: pathlib.Path) -> None:
    with pytest.raises(SettingError, match=r"data\.workers must be >= 1; got 0"):
        shards(request(root, workers=0))
    with pytest.raises(SettingError, match=r"data\.options\.image_size must be .* >= 1; got 0"):
        shards(request(root, size=0))
