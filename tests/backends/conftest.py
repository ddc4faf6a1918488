"""Opens the XLA device before any test runs a backward pass on the host.

Autograd's engine counts the devices at its first backward pass and knows none that comes later.
"""

from __future__ import annotations

from runner.xla.device import open_device

open_device()
