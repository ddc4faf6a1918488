"""These tests need what the extra `preflight` brings, for CPython 3.11 and later."""

from __future__ import annotations

import pytest

from runner.preflight.tpu_compiler import PINNED, installed
from runner.xla.device import open_device

# Before any backward pass on the host: see tests/backends/conftest.py.
open_device()


def pytest_ignore_collect() -> bool | None:
    return True if any(installed(package) is None for package in PINNED) else None


@pytest.fixture(autouse=True)
def own_cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads a verdict that another has left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
