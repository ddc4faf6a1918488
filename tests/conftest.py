"""Tests run on XLA's CPU device, whatever the machine has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ["PJRT_DEVICE"] = "CPU"
# Linux gives a process 65,530 memory maps, and a compiled program takes many: torch_xla would keep
# 2,048 programs of tests that have ended.
os.environ["XLA_COMPILATION_CACHE_SIZE"] = "128"


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many cases the fuzz tests try: `--fuzz 2000` before a release."""
    parser.addoption("--fuzz", type=int, default=100, help="cases of each fuzz test")


@pytest.fixture(autouse=True)
def _autocast_ends() -> Iterator[None]:
    """Left on, autocast would give the tests that follow another precision."""
    yield
    if torch := sys.modules.get("torch"):
        assert not [one for one in ("xla", "cpu") if torch.is_autocast_enabled(one)]
