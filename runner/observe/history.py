"""A run as its folder tells it, after the fact: its result and its curves."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

from runner.record.outcome import Result, State, result_from_json
from runner.record.rundir import RunDir

#: Points of a curve that are kept: more than a screen has.
_POINTS = 400
Curve = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """A run.

    Attributes:
        name: Its folder, relative to what was asked for.
        overrides: What was asked for.
        result: Its result, as far as it has come.
        curves: Tag to points (step, value), thinned out; only finite values.
    """

    name: str
    overrides: tuple[str, ...]
    result: Result
    curves: dict[str, Curve]

    @property
    def label(self) -> str:
        """What tells it from others, for people."""
        return f"{self.name} {' '.join(self.overrides)}".strip()


def read_result(run_dir: RunDir) -> Result | None:
    """The result in a run folder, or None if there is none that can be read.

    A run whose process is gone without a word is shown as cancelled: nothing more will happen.
    """
    try:
        result = result_from_json(json.loads(run_dir.result.read_text()))
    except (OSError, ValueError):
        return None
    if result.state is State.RUNNING and not run_dir.in_use():
        reason = "the runner was ended without a word; resume goes on with it"
        return dataclasses.replace(result, state=State.CANCELLED, reason=reason)
    return result


def read_history(path: pathlib.Path, *, name: str, tags: tuple[str, ...]) -> RunHistory | None:
    """The run in a folder with the curves of these tags, or None if there is no run in it.

    Args:
        path: The run folder.
        name: How the report calls it.
        tags: Tags, or beginnings of tags that end with a slash.
    """
    run_dir = RunDir(path)
    result = read_result(run_dir)
    if result is None:
        return None
    return RunHistory(name, run_dir.asked(), result, _curves(run_dir.metrics, tags))


def _curves(path: pathlib.Path, tags: tuple[str, ...]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    try:
        with open(path, "rb") as file:
            for line in file:
                _add(line, tags, curves)
    except OSError:
        return {}
    return {tag: _thin(curve) for tag, curve in curves.items()}


def _add(line: bytes, tags: tuple[str, ...], curves: dict[str, Curve]) -> None:
    try:
        values = json.loads(line)
        step = values["step"]
    except (ValueError, KeyError, TypeError):
        return  # a line that a crash cut short
    for tag, value in values.items():
        wanted = any(tag == each or (each.endswith("/") and tag.startswith(each)) for each in tags)
        if wanted and isinstance(value, (int, float)) and math.isfinite(value):
            curves.setdefault(tag, []).append((step, float(value)))


def _thin(curve: Curve) -> Curve:
    """At most about `_POINTS` of the points, the last among them."""
    stride = math.ceil(len(curve) / _POINTS)
    return curve if stride <= 1 else [*curve[:-1:stride], curve[-1]]
