"""What every job that classifies measures on held-out examples, and shows of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.base import Arrays, Batch, Decode, Job

Pixels = npt.NDArray[np.uint8]

#: Smallest and largest side of a shown image, and height of the words above it, in pixels.
SMALLEST_SIDE, LARGEST_SIDE, WORDS_HEIGHT = 84, 224, 16
RIGHT, WRONG = (0, 110, 0), (190, 0, 0)


class ImageClassifier(Job):
    """A job whose model turns "image" into logits of the classes, with "label" the right one."""

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Whether the best class is the right one, and cross entropy."""
        return class_metrics(model(batch["image"]), batch["label"])

    def show(
        self, batch: Arrays, predicted: npt.NDArray[Any], *, decode: Decode | None
    ) -> Mapping[str, str | Pixels]:
        """The images side by side, above each its class and what the model took it for."""
        tiles = [
            _tile(image, label=int(label), said=int(said))
            for image, label, said in zip(batch["image"], batch["label"], predicted, strict=True)
        ]
        return {"examples": np.concatenate(tiles, axis=1)}


def class_metrics(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Whether the best class is the right one, cross entropy, and the best class: each [batch].

    Args:
        logits: [batch, classes].
        label: int64 [batch].
    """
    logits = logits.float()
    best = logits.argmax(dim=1)
    return {
        "accuracy": (best == label).float(),
        "loss": F.cross_entropy(logits, label, reduction="none"),
        "predicted": best,
    }


def class_words(label: int, said: int) -> str:
    """An example's class, and what else the model took it for."""
    return f"{label}" if label == said else f"{label}, not {said}"


def _tile(image: npt.NDArray[np.float32], *, label: int, said: int) -> Pixels:
    """One image, float32 [channels, side, side] of any range, with its words above it.

    Of other than three channels the first is shown; what is no number is black.
    """
    image = image if len(image) == 3 else image[:1]
    numbers = image[np.isfinite(image)]
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)
    grey = np.nan_to_num((image - low) / ((high - low) or 1.0) * 255, posinf=255.0, neginf=0.0)
    pixels = np.broadcast_to(grey, (3, *grey.shape[1:])).transpose(1, 2, 0).astype(np.uint8)
    own = pixels.shape[0]
    side = LARGEST_SIDE if own > LARGEST_SIDE else own * max(1, -(-SMALLEST_SIDE // own))
    how = Image.Resampling.BOX if side < own else Image.Resampling.NEAREST
    tile = Image.new("RGB", (side + 4, side + WORDS_HEIGHT), "white")
    tile.paste(Image.fromarray(pixels).resize((side, side), how), (2, WORDS_HEIGHT))
    colour = RIGHT if label == said else WRONG
    ImageDraw.Draw(tile).text((2, 2), class_words(label, said), fill=colour)
    return np.asarray(tile)
