"""Files that others may read: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def write_atomic(path: pathlib.Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` by `content`: temporary name, flush, fsync, rename, fsync of the folder.

    Args:
        path: The file.
        content: Its new content.
        durable: Whether to wait until it would survive a power cut (some milliseconds): not
            for what is soon written again or can be made again.

    Raises:
        OSError: The disk is full or the folder is not writable; `path` is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(path: pathlib.Path, value: Any, *, durable: bool = True) -> None:
    """Replace `path` by strict JSON; see `write_atomic`.

    Raises:
        ValueError: `value` holds NaN or an infinity; use `strict_json` first.
    """
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n", durable=durable)


def sync_folder(folder: pathlib.Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def strict_json(value: Any) -> Any:
    """`value` with numbers that strict JSON lacks written as "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return json.dumps(value)
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    return value
