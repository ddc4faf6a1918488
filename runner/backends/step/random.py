"""Which of torch's operations draw random numbers."""

from __future__ import annotations

from typing import Any

import torch


def draws(target: Any) -> bool:
    """Whether what a graph calls is such an operation."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
