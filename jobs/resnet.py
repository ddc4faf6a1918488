"""ResNet on images: torchvision's models without weights, with a stem for small images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.base import Batch, fraction, setting, weight_decay_groups
from jobs.classify import ImageClassifier


class ResNet(ImageClassifier):
    """ResNet-18/34/50/101 that classifies images.

    Settings: `depth`; `stem`, "imagenet" (7x7 stride 2, then max-pool) or "small" (3x3 stride 1,
    for images below about 64 pixels); `zero_init_residual`; `label_smoothing`.
    """

    def __init__(self, settings: Mapping[str, Any], facts: Mapping[str, int]) -> None:
        super().__init__(settings, facts)
        self.depth = setting(settings, "depth", (18, 34, 50, 101))
        self.stem = setting(settings, "stem", ("small", "imagenet"))
        self.zero_init_residual = setting(settings, "zero_init_residual", (True, False))
        self.label_smoothing = fraction(settings, "label_smoothing")

    def build(self) -> nn.Module:
        """The network for images of shape [batch, channels, image_size, image_size]."""
        make = getattr(torchvision.models, f"resnet{self.depth}")
        model: nn.Module = make(
            num_classes=self.fact("classes"),
            zero_init_residual=self.zero_init_residual,
        )
        channels = self.fact("channels")
        if self.stem == "small":
            model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
            model.maxpool = nn.Identity()
        else:
            model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        logits = model(batch["image"]).float()
        return F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)

    def parameter_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Weight decay for convolutions and the classifier, none for norms and biases."""
        return weight_decay_groups(model)
