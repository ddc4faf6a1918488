"""What every job that classifies measures on held-out examples."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def class_metrics(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Whether the best class is the right one, and cross entropy: each of shape [batch].

    Args:
        logits: [batch, classes].
        label: int64 [batch].
    """
    logits = logits.float()
    return {
        "accuracy": (logits.argmax(dim=1) == label).float(),
        "loss": F.cross_entropy(logits, label, reduction="none"),
    }
