"""`env.json`: what a run ran with, so that it can be repeated."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import runner

_PACKAGES = (
    "torch",
    "torch_xla",
    "torchvision",
    "libtpu",
    "hydra-core",
    "omegaconf",
    "tensorboard",
    "numpy",
)


def describe_environment() -> dict[str, Any]:
    """Versions, host and git state; the worker adds its device when it has one."""
    return {
        "runner": runner.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git": _git(pathlib.Path(runner.__file__).parent),
    }


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: pathlib.Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds the runner, and whether it was changed since."""
    state = _git_state(folder)
    return None if state is None else {"commit": state[0], "dirty": state[1]}


@functools.cache  # a batch asks once a job, and the code that this process runs stays the same
def _git_state(folder: pathlib.Path) -> tuple[str, bool] | None:
    commit = _git_output(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git_output(folder, "status", "--porcelain", "--untracked-files=no")
    return commit.strip(), bool(changes)


def _git_output(folder: pathlib.Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
