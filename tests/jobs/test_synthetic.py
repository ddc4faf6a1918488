"""Random images for timing."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.base import DataRequest, SettingError
from jobs.images import synthetic

OPTIONS = {"examples": 10, "image_size": 8, "channels": 2, "classes": 4}


def request(seed: int = 0, **options: int) -> DataRequest:
    return DataRequest(root=None, options={**OPTIONS, **options}, workers=1, seed=seed)


def test_shapes_types_and_facts_are_as_asked() -> None:
    data = synthetic(request())
    batch = data.train.batch(np.array([1, 2, 2]), rng=np.random.default_rng(0))
    assert len(data.train) == 10
    assert data.heldout is None
    assert batch["image"].shape == (3, 2, 8, 8)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (3,)
    assert batch["label"].dtype == np.int64
    assert data.facts == {"classes": 4, "channels": 2, "image_size": 8}


def test_the_seed_fixes_the_images() -> None:
    first, second, other = (
        synthetic(request(seed)).train.batch(np.arange(10), rng=None)["image"] for seed in (1, 1, 2)
    )
    assert (first == second).all()
    assert (first != other).any()


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_an_option_below_one_is_named(option: str) -> None:
    with pytest.raises(SettingError, match=rf"data\.options\.{option} must be .* >= 1; got 0"):
        synthetic(request(**{option: 0}))
