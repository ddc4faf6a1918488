"""Checkpoints in an object store, through fsspec.

An object store renames nothing at once, so here the manifest, written last, is the commit: a
folder without one is a save that was cut short.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from runner.record.errors import ConfigError
from runner.record.manifest import MANIFEST, FileEntry, step_of
from runner.record.storage import Storage, copy_hashed


class CloudStorage(Storage):
    """A folder behind a URL such as gs://bucket/folder.

    Args:
        url: The folder.

    Raises:
        ConfigError: No installed package serves such URLs.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # Takes a while, and only this storage needs it.

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                "checkpoint.root must be a URL that an installed fsspec package serves (the extra "
                f"`cloud` brings gs:// and s3://); got {url!r}: {error}"
            ) from error
        self._protocol = url.partition("://")[0]

    def names(self) -> list[str]:
        """See `Storage.names`; a checkpoint without a manifest is not finished."""
        found = [name for name in self._folders() if step_of(name) is None or self._finished(name)]
        return found

    def begin(self, name: str) -> str:
        """See `Storage.begin`."""
        if name in self._folders():
            self.remove(name)
        self._fs.makedirs(self._at(name), exist_ok=True)
        return name

    def write(self, folder: str, file: str, parts: Iterable[memoryview]) -> FileEntry:
        """See `Storage.write`."""
        with self._fs.open(self._at(folder, file), "wb") as target:
            return copy_hashed(parts, target.write)

    def commit(self, folder: str, *, name: str, manifest: bytes) -> None:
        """See `Storage.commit`."""
        self._fs.pipe_file(self._at(name, MANIFEST), manifest)

    def read(self, folder: str, file: str) -> bytes:
        """See `Storage.read`."""
        content: bytes = self._fs.cat_file(self._at(folder, file))
        return content

    @contextlib.contextmanager
    def local(self, folder: str, file: str) -> Iterator[pathlib.Path]:
        """See `Storage.local`: a copy, which is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="runner-checkpoint-") as scratch:
            path = pathlib.Path(scratch) / file
            self._fs.get_file(self._at(folder, file), str(path))
            yield path

    def move(self, old: str, new: str) -> None:
        """See `Storage.move`; the manifest leaves first, so that no half is a checkpoint."""
        content = self.read(old, MANIFEST) if self._finished(old) else None
        self._withdraw(old)
        self._fs.copy(self._at(old), self._at(new), recursive=True)
        if content is not None:
            self._fs.pipe_file(self._at(new, MANIFEST), content)
        self._fs.rm(self._at(old), recursive=True)

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        self._withdraw(name)
        self._fs.rm(self._at(name), recursive=True)

    def clean(self) -> None:
        """See `Storage.clean`."""
        for name in self._folders():
            if step_of(name) is not None and not self._finished(name):
                self._fs.rm(self._at(name), recursive=True)

    def where(self, name: str) -> str:
        """See `Storage.where`."""
        return f"{self._protocol}://{self._at(name)}"

    def _withdraw(self, name: str) -> None:
        if self._finished(name):
            self._fs.rm_file(self._at(name, MANIFEST))

    def _finished(self, name: str) -> bool:
        return bool(self._fs.exists(self._at(name, MANIFEST)))

    def _folders(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            entries: list[dict[str, Any]] = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        folders = (entry["name"] for entry in entries if entry["type"] == "directory")
        return [name.rstrip("/").rpartition("/")[2] for name in folders]

    def _at(self, *parts: str) -> str:
        return "/".join((self._root.rstrip("/"), *parts))
