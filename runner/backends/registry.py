"""Backends by name. A backend's module is imported when it is asked for: `eager` needs no XLA."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from runner.backends.base import Backend, Recipe
from runner.backends.compiles import CompileLog
from runner.backends.sharding import ONE_DEVICE, Sharding
from runner.record.events import GraphRecord

#: Where each backend's class is.
BACKENDS = {
    "eager": "runner.backends.eager:Eager",
    "lazy": "runner.backends.lazy:Lazy",
    "openxla_step": "runner.backends.openxla_step:OpenXlaStep",
    "openxla": "runner.backends.openxla:OpenXla",
    "openxla_eval": "runner.backends.openxla:OpenXlaEval",
}


def build(
    name: str,
    recipe: Recipe,
    *,
    on_start: Callable[[str], None],
    on_record: Callable[[GraphRecord], None],
    strict: bool,
    steps_per_call: int = 1,
    labelled: bool = False,
    sharding: Sharding = ONE_DEVICE,
) -> Backend:
    """The named backend, owning the recipe's model.

    Args:
        name: One of `BACKENDS`.
        recipe: What to compute.
        on_start: See `CompileLog`.
        on_record: See `CompileLog`.
        strict: See `CompileLog`.
        steps_per_call: See `Backend`; more than 1 only with `openxla_step`.
        labelled: See `OpenXlaStep`; of no effect with others.
        sharding: The devices and what lies how on them; several only with `openxla_step` and
            `lazy`.

    Raises:
        DeviceError: Its device cannot be opened.
        ImportError: torch_xla is not installed; the message says how to install it.
    """
    module, _, cls = BACKENDS[name].partition(":")
    backend: type[Backend] = getattr(importlib.import_module(module), cls)
    log = CompileLog(on_record, on_start=on_start, totals=backend.compile_totals, strict=strict)
    options: dict[str, Any] = {}
    if name == "lazy":
        options = {"sharding": sharding}
    if name == "openxla_step":
        options = {"steps_per_call": steps_per_call, "labelled": labelled, "sharding": sharding}
    return backend(recipe, log=log, **options)
