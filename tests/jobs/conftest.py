"""Opens the XLA device before any test runs a backward pass on the host (see tests/backends)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from runner.xla.device import open_device

open_device()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small operations on several threads crawl when the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
