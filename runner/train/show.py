"""What a job shows of some held-out examples: text and pictures, for TensorBoard."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from runner.backends.base import SHOWN
from runner.record.events import Evaluated, Event, Notice
from runner.train.build import Built


class Show:
    """Some examples of one evaluation, from batches all over it: data often lie by class.

    Args:
        built: The job and its data.
        batches: How many batches the evaluation has.
    """

    def __init__(self, built: Built, *, batches: int) -> None:
        self._built = built
        self._every = max(1, batches // SHOWN)
        self._of_each = -(-SHOWN // batches)
        self._taken: list[tuple[dict[str, Tensor], Tensor]] = []
        self._seen = 0

    def take(self, batch: Mapping[str, Tensor], predicted: Tensor | None, *, examples: int) -> None:
        """Keep some of the next batch.

        Args:
            batch: The batch on the host.
            predicted: What the backend gave for it, on the device; None if the job says nothing.
            examples: How many of the batch count.
        """
        if self._seen % self._every == 0 and predicted is not None:
            count = min(examples, self._of_each)
            kept = {name: tensor[:count].clone() for name, tensor in batch.items()}
            self._taken.append((kept, predicted))
        self._seen += 1

    def added_to(self, event: Evaluated, *, say: Callable[[Event], None]) -> Evaluated:
        """The event with what the job shows. A job that fails at it is told so, no more."""
        if not self._taken:
            return event
        job, decode = self._built.job, self._built.data.decode
        names = self._taken[0][0]
        batch = {name: _joined(kept[name] for kept, _ in self._taken) for name in names}
        # sync: the end of an evaluation
        said = _joined(found.cpu()[: _examples(kept)] for kept, found in self._taken)
        try:
            shown = job.show(batch, said, decode=decode)
            texts = {name: value for name, value in shown.items() if isinstance(value, str)}
            images = {
                name: _png(value) for name, value in shown.items() if not isinstance(value, str)
            }
        except Exception as error:  # the job's own; nothing that the run needs
            what = f"{type(job).__name__}.show failed: {type(error).__name__}: {error}"
            say(Notice("warning", what))
            return event
        return dataclasses.replace(event, texts=texts, images=images)


def _examples(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _joined(parts: Iterable[Tensor]) -> npt.NDArray[Any]:
    return np.concatenate([part.numpy() for part in parts])[:SHOWN]


def _png(image: npt.NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
