"""Which held-out examples a job shows, and what becomes of a job that fails at it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.base import Dataset
from runner.backends.base import SHOWN
from runner.record.events import Evaluated, Event, Notice
from runner.train.build import Built
from runner.train.input import evaluation_batches
from runner.train.show import Show

EVALUATED = Evaluated(3, {"loss": 1.0}, examples=20, seconds=0.1)


class Counting:
    """Examples that are their own numbers."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Any, *, rng: Any) -> dict[str, Any]:
        return {"number": indices.copy()}


class Shows:
    """Stands for a job: shows the numbers and their negatives, or fails."""

    def __init__(self, fault: Exception | None = None) -> None:
        self._fault = fault

    def show(self, batch: Mapping[str, Any], predicted: Any, *, decode: Any) -> dict[str, Any]:
        if self._fault is not None:
            raise self._fault
        assert (batch["number"] == -predicted).all()
        picture = np.full((2, 5, 3), 9, dtype=np.uint8)
        return {"numbers": " ".join(map(str, batch["number"])), "picture": picture}


def shown(job: Any, *, examples: int, batch_size: int, said: list[Event]) -> Evaluated:
    source = Counting(examples)
    built = Built(job=job, data=Dataset(source, source, {}), recipe=None)  # type: ignore[arg-type]
    show = Show(built, batches=-(-examples // batch_size))
    for batch, mask in evaluation_batches(source, batch_size):
        show.take(batch, -batch["number"][:SHOWN], examples=int(mask.sum()))
    return show.added_to(EVALUATED, say=said.append)


@pytest.mark.parametrize(
    ("examples", "batch_size", "numbers"),
    [
        (20, 20, "0 1 2 3 4 5 6 7"),
        (20, 5, "0 1 5 6 10 11 15 16"),
        (11, 5, "0 1 2 5 6 7 10"),
        (3, 5, "0 1 2"),
        (100, 4, "0 12 24 36 48 60 72 84"),
    ],
)
def test_examples_come_from_all_over_the_held_out_data(
    examples: int, batch_size: int, numbers: str
) -> None:
    event = shown(Shows(), examples=examples, batch_size=batch_size, said=[])
    assert event.texts == {"numbers": numbers}
    image = Image.open(io.BytesIO(base64.b64decode(event.images["picture"])))
    assert (image.size, image.getpixel((0, 0))) == ((5, 2), (9, 9, 9))


def test_a_job_that_fails_to_show_is_told_so_and_the_metrics_stay() -> None:
    said: list[Event] = []
    event = shown(Shows(KeyError("image")), examples=4, batch_size=2, said=said)
    assert event == EVALUATED
    assert said == [Notice("warning", "Shows.show failed: KeyError: 'image'")]


def test_a_job_that_predicts_nothing_shows_nothing() -> None:
    show = Show(None, batches=1)  # type: ignore[arg-type]
    show.take({"x": torch.zeros(2)}, None, examples=2)
    assert show.added_to(EVALUATED, say=lambda event: pytest.fail(str(event))) == EVALUATED
