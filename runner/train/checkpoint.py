"""Checkpoints: a snapshot becomes files and a manifest, and comes back whole or not at all.

Everything that is read is checked against the manifest's sizes and SHA-256 first. When to save,
and in which thread, is `runner.train.saver`'s to say.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import functools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from runner.backends.snapshot import HostPiece, HostTensor, Snapshot
from runner.backends.state import TrainState
from runner.record import manifest as manifests
from runner.record.errors import CheckpointError
from runner.record.manifest import MANIFEST, FileEntry, Manifest, Piece, TensorEntry, folder_name
from runner.record.storage import Storage, hash_file
from runner.train import tensorfile
from runner.train.hosts import ALONE, Hosts

#: Files are about this large, so that several can be hashed at once.
FILE_BYTES = 1 << 28

#: Groups of tensors by the kind of file that they go into: weights are read without the rest.
_KINDS = {"params": "model", "buffers": "model", "optimizer": "optimizer"}


_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class DamagedError(CheckpointError):
    """A checkpoint is not what was saved; the message says what of it."""


@dataclasses.dataclass(frozen=True)
class Label:
    """What a checkpoint says of itself besides its tensors; see `Manifest`."""

    state_dict: Mapping[str, str]
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    name: str
    where: str
    bytes: int


def save(
    storage: Storage,
    snapshot: Snapshot,
    *,
    label: Label,
    hosts: Hosts = ALONE,
    progress: Callable[[], None] = lambda: None,
    file_bytes: int = FILE_BYTES,
) -> Saved:
    """Write a checkpoint and commit it. Every host writes what it holds; the first commits all.

    Args:
        storage: Where to.
        snapshot: The state.
        label: What the manifest says besides.
        hosts: Those that hold it together.
        progress: Called now and then while files are written.
        file_bytes: About the size of a file.

    Raises:
        OSError: It could not be written, here or by another host; nothing that was there has
            changed.
    """
    name = folder_name(snapshot.step)
    folder = _outcome(hosts.settle("begin", None, lambda _: _tried(lambda: storage.begin(name))))

    def write() -> dict[str, Any]:
        layout = _Layout(file_bytes, host=hosts.index)
        added = ((key, layout.add(key, tensor)) for key, tensor in snapshot.tensors.items())
        tensors = {key: entry for key, entry in added if entry is not None}
        files = {
            file: storage.write(folder, file, _telling(tensorfile.parts(content), progress))
            for file, content in layout.files.items()
        }
        return manifests.plain(
            Manifest(snapshot.step, files, tensors, label.state_dict, label.facts)
        )

    def commit(parts: list[dict[str, Any]]) -> int:
        manifest = manifests.joined([_outcome(part) for part in parts])
        if name in storage.names():  # saved before, at the same step: the same state
            storage.remove(name)
        storage.commit(folder, name=name, manifest=manifest.encode())
        return manifest.size

    written = _tried(write)
    size = _outcome(hosts.settle("commit", written, lambda parts: _tried(lambda: commit(parts))))
    return Saved(name, storage.where(name), size)


def _tried(do: Callable[[], Any]) -> dict[str, Any]:
    """What came of it as plain data, which the other hosts can be told."""
    try:
        return {"made": do()}
    except OSError as error:
        if error.errno is None:
            return {"failed": [str(error)]}
        file = None if error.filename is None else os.fsdecode(error.filename)
        return {"failed": [error.errno, error.strerror, file]}


def _outcome(tried: Mapping[str, Any]) -> Any:
    """What came of it, here or on another host.

    Raises:
        OSError: It failed.
    """
    if "failed" in tried:
        raise OSError(*tried["failed"])
    return tried["made"]


def _telling(parts: Iterator[memoryview], progress: Callable[[], None]) -> Iterator[memoryview]:
    for part in parts:
        yield part
        progress()


class _Layout:
    """Deals the tensors of a host out to files of about one size."""

    def __init__(self, file_bytes: int, *, host: int) -> None:
        self._host = host
        self.files: dict[str, dict[str, Tensor]] = {}
        self._file_bytes = file_bytes
        self._open: dict[str, str] = {}
        self._filled: dict[str, int] = {}

    def add(self, name: str, tensor: HostTensor) -> TensorEntry | None:
        """Give every piece of a tensor a place; None if this host has none to save."""
        kind = _KINDS[name.partition("/")[0]]
        # What every host holds all of is the first one's to save.
        own = [p for p in tensor.pieces if not self._host or p.values.shape != tensor.shape]
        if not own:
            return None
        parts = [part for p in own for part in _split(p, largest=self._file_bytes)]
        pieces = []
        for number, part in enumerate(parts):
            key = name if len(parts) == 1 else f"{name}#{number}"
            file = self._room(kind, part.values.numel() * part.values.element_size())
            assert key not in self.files[file], key
            self.files[file][key] = part.values
            pieces.append(Piece(file, key, part.offset, tuple(part.values.shape)))
        return TensorEntry(tensorfile.dtype_name(tensor.dtype), tensor.shape, tuple(pieces))

    def _room(self, kind: str, size: int) -> str:
        """The file of this kind that takes so many bytes more."""
        file = self._open.get(kind)
        if file is None or self._filled[file] + size > self._file_bytes:
            number = sum(name.startswith(kind) for name in self.files)
            start = f"{kind}-{self._host}" if self._host else kind
            file = self._open[kind] = f"{start}-{number:05}.safetensors"
            self.files[file], self._filled[file] = {}, 0
        self._filled[file] += size
        return file


def _split(piece: HostPiece, *, largest: int) -> Iterator[HostPiece]:
    """The piece in parts of at most `largest` bytes, cut along its first dimension.

    A single row that is larger stays whole.
    """
    values = piece.values
    total = values.numel() * values.element_size()
    if total <= largest or values.dim() == 0 or values.shape[0] <= 1:
        yield piece
        return
    rows = max(1, largest // math.ceil(total / values.shape[0]))
    first, *rest = piece.offset
    for start in range(0, values.shape[0], rows):
        yield HostPiece((first + start, *rest), values[start : start + rows])


def read_manifest(storage: Storage, name: str) -> Manifest:
    """A checkpoint's manifest, checked.

    Raises:
        DamagedError: It is missing, was changed, or is of another checkpoint.
        OSError: The medium fails.
    """
    try:
        manifest = manifests.decode(storage.read(name, MANIFEST))
    except _ABSENT as error:
        raise DamagedError(f"{MANIFEST} is missing") from error
    except CheckpointError as error:
        raise DamagedError(str(error)) from error
    if folder_name(manifest.step) != name:
        raise DamagedError(f"{MANIFEST} is of step {manifest.step}")
    return manifest


def load(
    storage: Storage, name: str, *, groups: Collection[str] = tuple(_KINDS)
) -> tuple[Manifest, dict[str, Tensor]]:
    """A checkpoint's manifest and tensors by `<group>/<name>`, all of them checked.

    Tensors may be views of the files on the disk, which are read when the values are.

    Raises:
        DamagedError: A file is missing, or is not what the manifest says.
        OSError: The medium fails.
    """
    manifest = read_manifest(storage, name)
    wanted = {k: t for k, t in manifest.tensors.items() if k.partition("/")[0] in groups}
    files = sorted({piece.file for tensor in wanted.values() for piece in tensor.pieces})
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        entries = [manifest.files[file] for file in files]
        contents = pool.map(functools.partial(_content, storage, name), files, entries)
        stored = dict(zip(files, contents, strict=True))
    return manifest, {key: _whole(key, tensor, stored) for key, tensor in wanted.items()}


def _content(storage: Storage, name: str, file: str, entry: FileEntry) -> dict[str, Tensor]:
    """The tensors of a file, once its size and hash are right."""
    try:
        with storage.local(name, file) as path:
            found = hash_file(path)
            if found.bytes != entry.bytes:
                raise DamagedError(f"{file} must have {entry.bytes} bytes; got {found.bytes}")
            if found.sha256 != entry.sha256:
                raise DamagedError(f"{file} does not match its SHA-256")
            return tensorfile.read(path)
    except _ABSENT as error:
        raise DamagedError(f"{file} is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedError(f"{file} cannot be read from the disk") from error
        raise


def _whole(name: str, entry: TensorEntry, stored: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """A tensor put together from its pieces."""
    pieces = [_piece(name, piece, entry.dtype, stored[piece.file]) for piece in entry.pieces]
    if len(pieces) == 1:
        return pieces[0]
    whole = torch.empty(entry.shape, dtype=pieces[0].dtype)
    for piece, values in zip(entry.pieces, pieces, strict=True):
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
        whole[box] = values
    return whole


def _piece(name: str, piece: Piece, dtype: str, content: Mapping[str, Tensor]) -> Tensor:
    values = content.get(piece.key)
    fits = values is not None and tuple(values.shape) == piece.shape
    if values is None or not fits or tensorfile.dtype_name(values.dtype) != dtype:
        raise DamagedError(f"{piece.file} does not hold {name} as {MANIFEST} says")
    return values


def state_of(tensors: Mapping[str, Tensor], *, step: int) -> TrainState:
    """The state whose tensors are named `<group>/<name>`."""
    groups: dict[str, dict[str, Tensor]] = {"params": {}, "buffers": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = tensor
    return TrainState(**groups, step=step)
