"""A residual MLP on images: the smallest job, for tests and first tries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.base import Batch, fraction, whole
from jobs.classify import ImageClassifier


class Block(nn.Module):
    """x + MLP(norm(x)) on [batch, width]."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The input with the block's change added."""
        return torch.add(x, self.layers(x))


class MLP(ImageClassifier):
    """A residual MLP that classifies flattened images.

    Settings: `width`; `depth`, its residual blocks; `dropout`.
    """

    def __init__(self, settings: Mapping[str, Any], facts: Mapping[str, int]) -> None:
        super().__init__(settings, facts)
        self.width = whole(settings, "width", least=1)
        self.depth = whole(settings, "depth", least=0)
        self.dropout = fraction(settings, "dropout")

    def build(self) -> nn.Module:
        """The network for images of shape [batch, channels, image_size, image_size]."""
        pixels = self.fact("channels") * self.fact("image_size") ** 2
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, self.width),
            *(Block(self.width, self.dropout) for _ in range(self.depth)),
            nn.LayerNorm(self.width),
            nn.Linear(self.width, self.fact("classes")),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(model(batch["image"]).float(), batch["label"])
