"""Tensors in safetensors files: written from memory as it is, read as views of the file.

Writing is ours because the library's copies every tensor while it holds Python's lock, which
would stop the training loop; reading, of bytes that may come from anybody, is the library's.
"""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Iterator, Mapping

import safetensors
import torch
from torch import Tensor

from runner.record.errors import CheckpointError

#: torch's type -> the name in a safetensors header.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_ALIGNMENT = 8


def parts(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Iterator[memoryview]:
    """The bytes of a file that holds `tensors`, without copying those that are contiguous.

    Args:
        tensors: Tensors on the host, by key.
        metadata: What the file says of itself.

    Raises:
        CheckpointError: A tensor has a type that the format lacks.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _code(key, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data


def read(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file, as views of its bytes on the disk.

    Raises:
        CheckpointError: It is no safetensors file.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """A type's name in a manifest: "float32"."""
    return str(dtype).removeprefix("torch.")


def _code(key: str, dtype: torch.dtype) -> str:
    try:
        return _CODES[dtype]
    except KeyError:
        known = ", ".join(dtype_name(known) for known in _CODES)
        raise CheckpointError(
            f"{key} must have a type that safetensors has ({known}); got {dtype_name(dtype)}"
        ) from None
