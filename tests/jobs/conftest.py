"""Opens the XLA device before any test runs a backward pass on the host (see tests/backends)."""

from __future__ import annotations

from runner.xla.device import open_device

open_device()
