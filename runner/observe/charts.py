"""Charts as SVG text, for a page that needs nothing but itself."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 36
_BAR = 22
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")

Points = Sequence[tuple[float, float]]


def colour(number: int) -> str:
    """A colour of a series."""
    return _COLOURS[number % len(_COLOURS)]


def line_chart(series: Mapping[str, Points], *, x: str, y: str, log: bool = False) -> str:
    """Curves over one pair of axes.

    Args:
        series: Name to points.
        x: Title of the x axis.
        y: Title of the y axis.
        log: Whether the y axis is logarithmic; values that are not above 0 are left out.
    """
    kept = {
        name: [(a, math.log10(b) if log else b) for a, b in points if not log or b > 0]
        for name, points in series.items()
    }
    every = [point for points in kept.values() for point in points]
    if not every:
        return "<p>nothing to draw</p>"
    frame = _Frame([a for a, _ in every], [b for _, b in every], log=log)
    lines = [
        f'<polyline fill="none" stroke="{colour(number)}" stroke-width="1.5" '
        f'points="{frame.path(points)}"><title>{html.escape(name)}</title></polyline>'
        for number, (name, points) in enumerate(kept.items())
        if points
    ]
    return _svg(_HEIGHT, frame.axes(x, y) + "".join(lines))


def histogram(series: Mapping[str, Sequence[float]], *, x: str, bins: int = 40) -> str:
    """How values of several series are distributed, over the range of nearly all of them."""
    every = sorted(value for values in series.values() for value in values)
    if not every:
        return "<p>nothing to draw</p>"
    low, high = every[0], every[min(len(every) - 1, int(len(every) * 0.99))]
    width = (high - low) / bins or 1.0
    counted: dict[str, Points] = {}
    for name, values in series.items():
        counts = [0] * bins
        for value in values:
            if value <= high:
                counts[min(bins - 1, int((value - low) / width))] += 1
        counted[name] = [
            point
            for number, count in enumerate(counts)
            for point in ((low + number * width, count), (low + (number + 1) * width, count))
        ]
    return line_chart(counted, x=x, y="points")


def stacked_bars(rows: Mapping[str, Mapping[str, float]], *, unit: str) -> str:
    """One bar a row, its parts side by side, and what the colours mean."""
    largest = max((sum(parts.values()) for parts in rows.values()), default=0.0)
    if not largest > 0:
        return "<p>nothing to draw</p>"
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    scale = (_WIDTH - _LEFT - 150) / largest
    drawn = []
    for row, (label, parts) in enumerate(rows.items()):
        x, y = float(_LEFT), row * _BAR
        drawn.append(_text(_LEFT - 6, y + 14, label, anchor="end"))
        for name, value in parts.items():
            title = f"<title>{html.escape(f'{label} {name}: {value:.3g} {unit}')}</title>"
            drawn.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{max(0.0, value * scale):.1f}" '
                f'height="{_BAR - 6}" fill="{colour(names.index(name))}">{title}</rect>'
            )
            x += value * scale
        drawn.append(_text(x + 6, y + 14, f"{sum(parts.values()):.3g} {unit}"))
    legend = "".join(
        f'<span><b style="background:{colour(number)}"></b>{html.escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{legend}</p>' + _svg(len(rows) * _BAR + 4, "".join(drawn))


class _Frame:
    """Axes, and where a point lies between them."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, log: bool) -> None:
        self._x, self._y = _range(xs), _range(ys)
        self._log = log

    def path(self, points: Points) -> str:
        return " ".join(f"{self._at_x(a):.1f},{self._at_y(b):.1f}" for a, b in points)

    def axes(self, x: str, y: str) -> str:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = [f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#888"/>']
        for value in _ticks(*self._x):
            parts.append(_text(self._at_x(value), bottom + 14, f"{value:.4g}", anchor="middle"))
        for value in _ticks(*self._y):
            shown = 10**value if self._log else value
            at = self._at_y(value)
            parts.append(_text(_LEFT - 6, at + 4, f"{shown:.3g}", anchor="end"))
            parts.append(f'<path d="M{_LEFT} {at:.1f}H{right}" stroke="#eee"/>')
        parts.append(_text((_LEFT + right) / 2, _HEIGHT - 6, x, anchor="middle"))
        parts.append(_text(_LEFT + 4, _TOP + 8, y))
        return "".join(parts)

    def _at_x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def _at_y(self, value: float) -> float:
        low, high = self._y
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    return low - (abs(low) or 1.0) / 2, low + (abs(low) or 1.0) / 2


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round values from `low` to `high`."""
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step)
    count = int((high - first * step) / step + 1e-9) + 1
    return [(first + number) * step for number in range(max(0, count))]


def _text(x: float, y: float, words: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _svg(height: int, content: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{content}</svg>'
