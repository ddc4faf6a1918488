"""Vision Transformer on images: torchvision's model without weights, of any size."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from jobs.base import (
    Batch,
    SettingError,
    Sharding,
    fraction,
    positive,
    weight_decay_groups,
    whole,
)
from jobs.classify import ImageClassifier
from jobs.stack import Stack


class ViT(ImageClassifier):
    """A Vision Transformer that classifies images.

    Settings: `patch`, the side of a patch in pixels, which divides the image's; `depth`; `width`;
    `heads`, which divide the width; `dropout`; `label_smoothing`; `position_std`, the spread of
    the initial position embeddings: 0.02 for large data, up to that of the patches, 1, for small.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", 2021.
    """

    # The attention's `in_proj_weight` holds queries, keys and values one below the other: cut
    # over "tensor" its parts would not be heads.
    sharding: ClassVar[Sharding] = {
        r"conv_proj\.weight": ("fsdp", None, None, None),
        r"in_proj_weight": ("fsdp", None),
        r"out_proj\.weight": ("fsdp", None),
        r"mlp\.0\.weight": ("tensor", "fsdp"),
        r"mlp\.0\.bias": ("tensor",),
        r"mlp\.3\.weight": ("fsdp", "tensor"),
        r"head\.weight": (None, "fsdp"),
    }

    def __init__(self, settings: Mapping[str, Any], facts: Mapping[str, int]) -> None:
        super().__init__(settings, facts)
        self.patch = whole(settings, "patch", least=1)
        self.depth = whole(settings, "depth", least=1)
        self.width = whole(settings, "width", least=1)
        self.heads = whole(settings, "heads", least=1)
        self.dropout = fraction(settings, "dropout")
        self.label_smoothing = fraction(settings, "label_smoothing")
        self.position_std = positive(settings, "position_std")
        side = self.fact("image_size")
        if side % self.patch:
            raise SettingError(
                f"model.patch must be a divisor of data.options.image_size, {side} pixels; "
                f"got {self.patch}"
            )
        if self.width % self.heads:
            raise SettingError(
                f"model.heads must be a divisor of model.width, {self.width}; got {self.heads}"
            )

    def build(self) -> nn.Module:
        """The network for images of shape [batch, channels, image_size, image_size]."""
        model = VisionTransformer(
            image_size=self.fact("image_size"),
            patch_size=self.patch,
            num_layers=self.depth,
            num_heads=self.heads,
            hidden_dim=self.width,
            mlp_dim=4 * self.width,
            dropout=self.dropout,
            num_classes=self.fact("classes"),
        )
        channels = self.fact("channels")
        model.conv_proj = nn.Conv2d(channels, self.width, self.patch, stride=self.patch)
        nn.init.trunc_normal_(model.conv_proj.weight, std=math.sqrt(1 / channels) / self.patch)
        nn.init.zeros_(model.conv_proj.bias)
        nn.init.normal_(model.encoder.pos_embedding, std=self.position_std)
        model.encoder.layers = Stack(OrderedDict(model.encoder.layers.named_children()))
        return model  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        logits = model(batch["image"]).float()
        return F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)

    def parameter_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Weight decay for matrices, none for norms and biases."""
        return weight_decay_groups(model)
