"""What `openxla_step` is to reach, and whether it did, from the rows of one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from contest.rounds import Row, ratio

#: Where the host, not the device, is what a lazy step waits for.
HOST_BOUND = ("mlp", "gpt")


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound and the figure that is held to it.

    Attributes:
        model: The model.
        what: The figure, in words.
        bound: "<=", ">=" or "==".
        limit: What it must be.
        figure: What it is, or None where a row is missing.
        met: Whether it is, or None.
    """

    model: str
    what: str
    bound: str
    limit: float
    figure: float | None
    met: bool | None


def targets(rows: Sequence[Row]) -> list[Target]:
    """The targets of the models that were run, for which openxla_step has a row."""
    found: list[Target] = []
    for model in dict.fromkeys(row.model for row in rows):
        by_name = {row.contestant: row for row in rows if row.model == model}
        if "openxla_step" in by_name:
            found += _of_model(model, by_name)
    return found


def _of_model(model: str, rows: dict[str, Row]) -> Iterator[Target]:
    step = rows["openxla_step"]
    missing = Row(model, "missing")
    if model in HOST_BOUND:
        for name in ("lazy", "torch_openxla"):
            slower = ratio(rows.get(name, missing).step_median_ms, step.step_median_ms)
            yield _target(model, f"{name} / openxla_step", ">=", 4.0, slower)
        to_jax = ratio(step.step_median_ms, rows.get("jax", missing).step_median_ms)
        yield _target(model, "openxla_step / jax", "<=", 1.10, to_jax)
    if model == "resnet18":
        for name in (name for name in rows if name != "openxla_step"):
            slower = ratio(step.step_median_ms, rows[name].step_median_ms)
            yield _target(model, f"openxla_step / {name}", "<=", 1.0, slower)
        yield _target(model, "host / binding's own call", "<=", 1.2, step.host_to_binding)
    lazy = rows.get("lazy", missing)
    started = ratio(step.first_step_s, lazy.first_step_s)
    yield _target(model, "first step / lazy's first step", "<=", 1.3, started)
    yield _target(model, "programs a step", "==", 1, step.programs_per_step)
    yield _target(model, "compiles", "==", 1, step.compiles)


def _target(model: str, what: str, bound: str, limit: float, figure: float | None) -> Target:
    if figure is None:
        return Target(model, what, bound, limit, None, None)
    met = {"<=": figure <= limit, ">=": figure >= limit, "==": figure == limit}[bound]
    return Target(model, what, bound, limit, figure, met)
