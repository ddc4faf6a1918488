"""The manifest of a checkpoint: which files hold which pieces of which tensors.

It is written last and sealed with a hash of its own, so a folder with a valid manifest is a
whole checkpoint. What the tensors mean is not known here, nor how their bytes are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from runner.record.errors import CheckpointError

SCHEMA = 1
MANIFEST = "manifest.json"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FOLDER_NAME = re.compile(r"step-(\d{8,18})")


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """What a file must be: its size and the SHA-256 of its content, in hex."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of a tensor, stored as one tensor of a file.

    Attributes:
        file: The file's name in the checkpoint's folder.
        key: The tensor's name in the file.
        offset: The box's first index along each dimension of the whole tensor.
        shape: The box's size along each dimension.
    """

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A whole tensor: its type ("float32"), its shape, and boxes that cover it once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that a checkpoint holds.

    Attributes:
        step: Completed optimizer updates.
        files: File name to what it must be.
        tensors: `<group>/<name>` to the tensor.
        state_dict: Key of the module's state dict to the tensor that it names; tied weights
            share one.
        facts: What wrote it, for people.
    """

    step: int
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    state_dict: Mapping[str, str]
    facts: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.bytes for entry in self.files.values())

    def encode(self) -> bytes:
        """The content of `manifest.json`."""
        return seal({"schema": SCHEMA, **dataclasses.asdict(self)})


def plain(manifest: Manifest) -> dict[str, Any]:
    """A manifest as plain data."""
    return dataclasses.asdict(manifest)


def joined(parts: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest of what several hosts have written, each its own pieces.

    Args:
        parts: What each has written, as `plain` gives it.

    Raises:
        CheckpointError: Together they are not whole.
    """
    first, *others = map(_manifest, parts)
    if not others:
        return first
    tensors = dict(first.tensors)
    for name, entry in ((n, e) for other in others for n, e in other.tensors.items()):
        before = tensors[name].pieces if name in tensors else ()
        tensors[name] = dataclasses.replace(entry, pieces=(*before, *entry.pieces))
    files = {name: entry for part in (first, *others) for name, entry in part.files.items()}
    manifest = dataclasses.replace(first, files=files, tensors=tensors)
    _check(manifest)
    return manifest


def seal(body: Mapping[str, Any]) -> bytes:
    """JSON values together with their SHA-256."""
    text = _canonical(body)
    return b'{"sha256":"%s","body":%s}\n' % (_digest(text).encode(), text)


def decode(content: bytes) -> Manifest:
    """The manifest of a file's content.

    Raises:
        CheckpointError: It is no manifest, was changed, or is not consistent in itself.
    """
    try:
        outer = json.loads(content)
        body = outer["body"]
        if outer["sha256"] != _digest(_canonical(body)):
            raise CheckpointError(f"{MANIFEST} does not match its own SHA-256")
        if body["schema"] != SCHEMA:
            raise CheckpointError(
                f"{MANIFEST} must have schema {SCHEMA}, which this version reads; "
                f"got {body['schema']!r}"
            )
        manifest = _manifest(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {type(error).__name__}") from error
    _check(manifest)
    return manifest


def folder_name(step: int) -> str:
    """The folder of the checkpoint after `step` updates."""
    return f"step-{step:08}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder, or None if it is the name of something else."""
    match = _FOLDER_NAME.fullmatch(name)
    if match is None or folder_name(int(match[1])) != name:
        return None
    return int(match[1])


def _canonical(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _manifest(body: Mapping[str, Any]) -> Manifest:
    return Manifest(
        step=_count(body["step"]),
        files={
            name: FileEntry(_count(entry["bytes"]), str(entry["sha256"]))
            for name, entry in body["files"].items()
        },
        tensors={name: _tensor(entry) for name, entry in body["tensors"].items()},
        state_dict={str(key): str(name) for key, name in body["state_dict"].items()},
        facts=dict(body["facts"]),
    )


def _tensor(entry: Mapping[str, Any]) -> TensorEntry:
    pieces = (
        Piece(str(p["file"]), str(p["key"]), _counts(p["offset"]), _counts(p["shape"]))
        for p in entry["pieces"]
    )
    return TensorEntry(str(entry["dtype"]), _counts(entry["shape"]), tuple(pieces))


def _counts(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"not a count: {value!r}")
    return value


def _check(manifest: Manifest) -> None:
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(f"{MANIFEST} names the file {name!r}, which must be a plain name")
    for name, tensor in manifest.tensors.items():
        if any(piece.file not in manifest.files for piece in tensor.pieces):
            raise CheckpointError(f"{MANIFEST}: {name} is in a file that is not listed")
        if not _covered(tensor):
            raise CheckpointError(f"{MANIFEST}: the pieces of {name} must cover it exactly once")
    unknown = [name for name in manifest.state_dict.values() if name not in manifest.tensors]
    if unknown:
        raise CheckpointError(f"{MANIFEST}: the state dict names {unknown[0]}, which is not there")


def _covered(tensor: TensorEntry) -> bool:
    inside = all(
        len(piece.offset) == len(piece.shape) == len(tensor.shape)
        and all(o + s <= n for o, s, n in zip(piece.offset, piece.shape, tensor.shape, strict=True))
        for piece in tensor.pieces
    )
    if not inside or not tensor.pieces:
        return False
    whole = sum(math.prod(piece.shape) for piece in tensor.pieces) == math.prod(tensor.shape)
    return whole and not any(_overlap(a, b) for a, b in itertools.combinations(tensor.pieces, 2))


def _overlap(a: Piece, b: Piece) -> bool:
    return all(
        max(ao, bo) < min(ao + an, bo + bn)
        for ao, an, bo, bn in zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    )
