"""Tests run on XLA's CPU device, whatever the machine has."""

from __future__ import annotations

import os

import pytest

os.environ["PJRT_DEVICE"] = "CPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many cases the fuzz tests try: `--fuzz 2000` before a release."""
    parser.addoption("--fuzz", type=int, default=100, help="cases of each fuzz test")
