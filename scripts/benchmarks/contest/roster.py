"""Who takes part in `scripts/bench step`, by name. Imports nothing of theirs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contest.contestant import Contestant

#: Models, in the table's order, and the updates in a burst that suit their size.
MODELS = {"mlp": 20, "gpt": 20, "resnet18": 10, "gpt_128": 10}

#: Contestants, in the table's order: where each one's class is, and what it is made with.
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "eager": ("contest.ours:Ours", {"backend": "eager"}),
    "lazy": ("contest.ours:Ours", {"backend": "lazy"}),
    "torch_openxla": ("contest.stock:Stock", {}),
    "openxla": ("contest.ours:Ours", {"backend": "openxla"}),
    "openxla_step": ("contest.ours:Ours", {"backend": "openxla_step"}),
    "openxla_step_k10": ("contest.ours:Ours", {"backend": "openxla_step", "updates": 10}),
    "jax": ("contest.jaxed:Jax", {}),
}

#: Those whose step is one call of the binding, which is then timed by itself.
BOUND = ("openxla_step", "openxla_step_k10")


def create(model: str, name: str) -> Contestant:
    """The named contestant on the named model; imports what it needs."""
    place, options = CONTESTANTS[name]
    module, _, cls = place.partition(":")
    made: Contestant = getattr(importlib.import_module(module), cls)(model, **options)
    return made
