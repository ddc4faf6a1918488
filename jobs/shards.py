"""Images in tar shards of the webdataset layout, with random access.

A sample is two members of a tar that share a name: an image and `.cls`, the number of its class.
Where each member lies is read once from the headers, so a batch is a function of its indices and
its `rng` alone, as with a folder of images, and a resumed run goes on with the very next one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jobs.base import Arrays, DataError, DataRequest, Dataset, whole
from jobs.images import FOLDER_HELDOUT_NAMES, FOLDER_SUFFIXES, load_images, worker_pool

Integers = npt.NDArray[np.int64]

LABEL_SUFFIX = ".cls"
INDEX = ".index.npz"


def shards(request: DataRequest) -> Dataset:
    """The user's own shards: root/train*.tar or root/train/*.tar, and so for "val".

    The held-out part may also be called "validation" or "test". Option: `image_size`. The first
    run over a folder reads every header and keeps what it found in a hidden file there, if the
    folder can be written to.

    Raises:
        DataError: The root is not set, missing or empty, or a shard is broken.
        SettingError: An option breaks a rule.
    """
    size = whole(request.options, "image_size", least=1, section="data.options")
    pool = worker_pool(request)
    if request.root is None:
        raise DataError("data=shards needs a folder: set data.root=/path/to/shards")
    root = pathlib.Path(request.root).expanduser()
    train = _indexed(root, "train", pool)
    if train is None:
        raise DataError(f"{root}: has no train*.tar and no train/*.tar")
    found = (_indexed(root, name, pool) for name in FOLDER_HELDOUT_NAMES)
    heldout = next((index for index in found if index is not None), None)
    classes = int(train.label.max()) + 1
    if heldout is not None and heldout.label.max() >= classes:
        raise DataError(
            f"{root}: the held-out part has the class {heldout.label.max()}; the training part "
            f"has those from 0 to {classes - 1}"
        )
    facts = {"classes": classes, "channels": 3, "image_size": size}
    return Dataset(
        ShardSource(train, size, pool),
        None if heldout is None else ShardSource(heldout, size, pool),
        facts,
    )


@dataclasses.dataclass(frozen=True)
class Index:
    """Where each sample lies.

    Attributes:
        files: The shards.
        shard: Number of each sample's shard: [samples].
        offset: Where its image begins there, in bytes.
        size: How many bytes its image has.
        label: Number of its class.
    """

    files: Sequence[str]
    shard: Integers
    offset: Integers
    size: Integers
    label: Integers


@dataclasses.dataclass(frozen=True)
class ShardSource:
    """Images of an index, decoded by a pool of threads."""

    index: Index
    size: int
    pool: concurrent.futures.Executor

    def __len__(self) -> int:
        return len(self.index.label)

    def batch(self, indices: Integers, *, rng: np.random.Generator | None) -> Arrays:
        """The images at `indices`; `rng` crops, resizes and flips them.

        Raises:
            DataError: A shard is gone or shorter than it was, or an image is not whole.
        """
        images = load_images(indices, self._open, rng=rng, size=self.size, pool=self.pool)
        return {"image": images, "label": self.index.label[indices]}

    def _open(self, sample: int) -> tuple[str, io.BytesIO]:
        """A sample's name for messages, and its image's bytes."""
        index = self.index
        file, offset = index.files[index.shard[sample]], int(index.offset[sample])
        try:
            with open(file, "rb") as shard:
                shard.seek(offset)
                content = shard.read(int(index.size[sample]))
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error}") from error
        return f"{file} at byte {offset:,}", io.BytesIO(content)


def _indexed(root: pathlib.Path, part: str, pool: concurrent.futures.Executor) -> Index | None:
    files = [*sorted(root.glob(f"{part}*.tar")), *sorted((root / part).glob("*.tar"))]
    if not files:
        return None
    kept = root / f".{part}{INDEX}"
    state = json.dumps([[file.name, *_state(file)] for file in files])
    columns = _kept(kept, state)
    if columns is None:
        found = list(pool.map(lambda file: np.array(list(_samples(file)), dtype=np.int64), files))
        for file, samples in zip(files, found, strict=True):
            if not len(samples):
                raise DataError(f"{file}: has no image ({', '.join(FOLDER_SUFFIXES)})")
        shard = np.repeat(np.arange(len(files)), [len(samples) for samples in found])
        columns = np.column_stack([shard, np.concatenate(found)])
        _keep(kept, state, columns)
    return Index([str(file) for file in files], *columns.T)


def _state(file: pathlib.Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns


def _kept(path: pathlib.Path, state: str) -> Integers | None:
    """The index that an earlier run kept, unless a shard has changed since."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["columns"] if str(file["state"]) == state else None
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _keep(path: pathlib.Path, state: str, columns: Integers) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, state=np.array(state), columns=columns)
        os.replace(temporary, path)
    except OSError:  # a folder that is read-only is read anew by every run
        with contextlib.suppress(OSError):
            temporary.unlink()


def _samples(file: pathlib.Path) -> Iterator[tuple[int, int, int]]:
    """Offset and size of each image of a shard, and its class; in order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                name, suffix = os.path.splitext(member.name)
                if not member.isfile() or os.path.basename(name).startswith("."):
                    continue
                if suffix.lower() in FOLDER_SUFFIXES:
                    images[name] = member.offset_data, member.size
                elif suffix == LABEL_SUFFIX:
                    labels[name] = _label(shard, member, file)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{file}: cannot be read as a tar: {error}") from error
    for name, (offset, size) in images.items():
        if name not in labels:
            raise DataError(f"{file}: the image {name} has no {name}{LABEL_SUFFIX}")
        yield offset, size, labels[name]


def _label(shard: tarfile.TarFile, member: tarfile.TarInfo, file: pathlib.Path) -> int:
    content = shard.extractfile(member)
    assert content is not None
    text = content.read(32)
    if not text.strip().isdigit():
        raise DataError(f"{file}: {member.name} must be a class's number; got {text!r}")
    return int(text)
