"""A checkpoint's weights as a plain state dict, for torchvision, transformers and the like.

`python -m runner.train.export REQUEST` is started by the command line, which imports no torch.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Mapping

from torch import Tensor

from runner.record.checkpoints import find_source
from runner.record.errors import CheckpointError, ConfigError, RunnerError
from runner.record.files import sync_folder
from runner.record.manifest import folder_name
from runner.record.storage import copy_hashed
from runner.train import tensorfile
from runner.train.checkpoint import load


def export(source: str, to: pathlib.Path, *, strip: str = "") -> int:
    """Write the state dict of the newest whole checkpoint; returns its step.

    Args:
        source: A run folder, a checkpoint's folder, or a URL of either.
        to: The safetensors file; replaced if it is there.
        strip: Prefix that every key loses.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: There is no checkpoint, or a key lacks the prefix.
    """
    found = find_source(source, key="export")
    name = found.name or folder_name(found.storage.steps()[0])
    try:
        manifest, tensors = load(found.storage, name, groups=("params", "buffers"))
    except CheckpointError as error:
        raise CheckpointError(f"{found.storage.where(name)}: {error}") from error
    state = {key: tensors[tensor] for key, tensor in manifest.state_dict.items()}
    for key in state:
        if not key.startswith(strip):
            raise ConfigError(f"--strip must be a prefix of every key; {key!r} lacks {strip!r}")
    _write({key.removeprefix(strip): tensor for key, tensor in state.items()}, to)
    return manifest.step


def _write(state: Mapping[str, Tensor], to: pathlib.Path) -> None:
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            # transformers reads only files that say which framework's tensors they hold.
            copy_hashed(tensorfile.parts(state, metadata={"format": "pt"}), file.write)
            os.fsync(file.fileno())
        os.replace(temporary, to)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(to.absolute().parent)


def main() -> int:
    """Do what the request in the arguments asks; returns the exit code."""
    request = json.loads(sys.argv[1])
    try:
        step = export(request["source"], pathlib.Path(request["to"]), strip=request["strip"])
    except RunnerError as error:
        print(f"runner: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(f"wrote {request['to']} (the weights after step {step})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
