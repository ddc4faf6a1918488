"""Tests run on XLA's CPU device, whatever the machine has."""

from __future__ import annotations

import os

os.environ["PJRT_DEVICE"] = "CPU"
