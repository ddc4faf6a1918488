"""Files that others may read: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def write_atomic(path: pathlib.Path, content: str | bytes) -> None:
    """Replace `path` by `content`: temporary name, flush, fsync, rename, fsync of the folder.

    Raises:
        OSError: The disk is full or the folder is not writable; `path` is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replace `path` by strict JSON.

    Raises:
        ValueError: `value` holds NaN or an infinity; use `strict_json` first.
    """
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


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
