"""Where the checkpoints of a run are kept, and what makes one complete.

On a local disk a checkpoint is written under another name, and renaming its folder is the
commit. What a checkpoint holds is `runner.record.manifest`'s to say.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

from runner.record.files import sync_folder
from runner.record.manifest import MANIFEST, FileEntry, step_of

#: Bytes that are read and hashed, or written, at a time.
CHUNK_BYTES = 1 << 22
#: Folders of saves that were cut short, and of checkpoints on their way out.
_WRITING, _REMOVING = ".writing-", ".removing-"


class Storage(abc.ABC):
    """A folder of checkpoints; one process writes to it.

    Every method raises OSError where the medium fails.
    """

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Every folder in it, finished checkpoints and others."""

    @abc.abstractmethod
    def begin(self, name: str) -> str:
        """Make an empty folder to write the checkpoint `name` to; returns its name."""

    @abc.abstractmethod
    def write(self, folder: str, file: str, parts: Iterable[memoryview]) -> FileEntry:
        """Write a file that survives a power cut; returns what it must be from now on."""

    @abc.abstractmethod
    def commit(self, folder: str, *, name: str, manifest: bytes) -> None:
        """Make what was written to `folder` the checkpoint `name`, at once and for good."""

    @abc.abstractmethod
    def read(self, folder: str, file: str) -> bytes:
        """The content of a small file."""

    @abc.abstractmethod
    def local(self, folder: str, file: str) -> contextlib.AbstractContextManager[pathlib.Path]:
        """The file on a local disk while the context is open."""

    @abc.abstractmethod
    def move(self, old: str, new: str) -> None:
        """Give a folder another name, for people to look at."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove a folder; half removed it is no checkpoint."""

    @abc.abstractmethod
    def clean(self) -> None:
        """Remove what a process that was killed has left half written or half removed."""

    @abc.abstractmethod
    def where(self, name: str) -> str:
        """A folder's full name, for people."""

    def steps(self) -> list[int]:
        """Steps of the checkpoints, newest first."""
        found = (step_of(name) for name in self.names())
        return sorted((step for step in found if step is not None), reverse=True)

    def set_aside(self, name: str, label: str) -> str:
        """Rename a checkpoint to `<label>-<name>`, which nothing takes for one; its new name."""
        taken, new, number = set(self.names()), f"{label}-{name}", 1
        while new in taken:
            number += 1
            new = f"{label}-{name}.{number}"
        self.move(name, new)
        return new


class LocalStorage(Storage):
    """A folder on a local disk, or on one that is mounted.

    Args:
        path: The folder; made when it is first written to.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        """See `Storage.names`."""
        try:
            return [entry.name for entry in os.scandir(self._path) if entry.is_dir()]
        except FileNotFoundError:
            return []

    def begin(self, name: str) -> str:
        """See `Storage.begin`."""
        folder = self._path / f"{_WRITING}{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder.name

    def write(self, folder: str, file: str, parts: Iterable[memoryview]) -> FileEntry:
        """See `Storage.write`."""
        with open(self._path / folder / file, "xb", buffering=0) as target:
            entry = copy_hashed(parts, target.write)
            os.fsync(target.fileno())
        return entry

    def commit(self, folder: str, *, name: str, manifest: bytes) -> None:
        """See `Storage.commit`."""
        self.write(folder, MANIFEST, [memoryview(manifest)])
        sync_folder(self._path / folder)
        os.rename(self._path / folder, self._path / name)
        sync_folder(self._path)

    def read(self, folder: str, file: str) -> bytes:
        """See `Storage.read`."""
        return (self._path / folder / file).read_bytes()

    @contextlib.contextmanager
    def local(self, folder: str, file: str) -> Iterator[pathlib.Path]:
        """See `Storage.local`."""
        yield self._path / folder / file

    def move(self, old: str, new: str) -> None:
        """See `Storage.move`."""
        os.rename(self._path / old, self._path / new)
        sync_folder(self._path)

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        leaving = self._path / f"{_REMOVING}{name}"
        shutil.rmtree(leaving, ignore_errors=True)
        os.rename(self._path / name, leaving)
        shutil.rmtree(leaving)

    def clean(self) -> None:
        """See `Storage.clean`."""
        for name in self.names():
            if name.startswith((_WRITING, _REMOVING)):
                shutil.rmtree(self._path / name, ignore_errors=True)

    def where(self, name: str) -> str:
        """See `Storage.where`."""
        return str(self._path / name)


def copy_hashed(parts: Iterable[memoryview], write: Callable[[memoryview], int]) -> FileEntry:
    """Hand flat bytes to `write` and hash them on the way; returns what was written."""
    digest, size = hashlib.sha256(), 0
    for part in parts:
        for start in range(0, len(part), CHUNK_BYTES):
            chunk = part[start : start + CHUNK_BYTES]
            digest.update(chunk)
            size += len(chunk)
            while chunk:
                chunk = chunk[write(chunk) :]
    return FileEntry(size, digest.hexdigest())


def hash_file(path: pathlib.Path) -> FileEntry:
    """What a file is."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        # The disk then reads ahead while a chunk is hashed.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileEntry(size, digest.hexdigest())
