"""Backends by name. A backend's module is imported when it is asked for: `eager` needs no XLA."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from runner.backends.base import Backend, Recipe
from runner.backends.compiles import CompileLog
from runner.record.events import GraphRecord

#: Where each backend's class is.
BACKENDS = {
    "eager": "runner.backends.eager:Eager",
    "lazy": "runner.backends.lazy:Lazy",
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
) -> Backend:
    """The named backend, owning the recipe's model.

    Args:
        name: One of `BACKENDS`.
        recipe: What to compute.
        on_start: See `CompileLog`.
        on_record: See `CompileLog`.
        strict: See `CompileLog`.

    Raises:
        DeviceError: Its device cannot be opened.
        ImportError: torch_xla is not installed; the message says how to install it.
    """
    module, _, cls = BACKENDS[name].partition(":")
    backend: type[Backend] = getattr(importlib.import_module(module), cls)
    log = CompileLog(on_record, on_start=on_start, totals=backend.compile_totals, strict=strict)
    return backend(recipe, log=log)
