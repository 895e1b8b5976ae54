"""Line charts as inline SVG: axes, series with error bars, labels beside the lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 310
LEFT, RIGHT, TOP, BOTTOM = 46, 98, 12, 46
DODGE = 2.2
"""Pixels between the marks of neighbouring series, so that error bars do not cover each other."""
LINE_GAP = 14
"""Pixels between the labels at the ends of the lines."""


@dataclass(frozen=True)
class Mark:
    """One point of a series, in the data's units; ``low`` and ``high`` end its error bar where it has one."""

    x: float
    y: float
    low: float
    high: float
    tip: str


@dataclass(frozen=True)
class Series:
    """A line: ``style`` names the CSS class and the shape of its marks, ``label`` stands at its end."""

    label: str
    style: str
    marks: list[Mark]


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high``, with ticks; ``place`` maps a value to where it goes, in any unit."""

    title: str
    low: float
    high: float
    ticks: list[tuple[float, str]]
    place: Callable[[float], float] = field(default=lambda v: v)

    def at(self, value: float, start: float, end: float) -> float:
        """Pixel of ``value`` on an axis from ``start`` to ``end``; what lies outside goes to the edge."""
        low, high = self.place(self.low), self.place(self.high)
        part = (self.place(min(max(value, self.low), self.high)) - low) / (high - low)
        return start + part * (end - start)


def sparsity_axis(sparsities: Sequence[float]) -> Axis:
    """Sparsities spaced by the logarithm of what is kept, so that 90 to 98 % has room."""
    ticks = [(s, f"{100 * s:g}") for s in sparsities]
    return Axis("% of the weights pruned", min(sparsities), max(sparsities), ticks, lambda s: -math.log10(1 - s))


def nice_axis(title: str, low: float, high: float, show: Callable[[float], str]) -> Axis:
    """A linear axis whose ends and ticks are round numbers around ``low`` to ``high``."""
    span = max(high - low, 1e-9)
    raw = span / 6
    base = 10 ** math.floor(math.log10(raw))
    unit = next(m * base for m in (1, 2, 5, 10) if m * base >= raw)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    ticks = [i * unit for i in range(first, last + 1)]
    return Axis(title, ticks[0], ticks[-1], [(t, show(t)) for t in ticks])


def line_chart(
    name: str, x: Axis, y: Axis, series: Sequence[Series], reference: tuple[float, str] | None = None
) -> str:
    """A chart of several series as one ``<svg>``.

    Args:
        name: what the chart shows, for readers who do not see it.
        x, y: the axes.
        series: drawn in this order.
        reference: a height and its label, drawn as a dashed line behind the series.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [_grid(x, y, right, bottom)]
    if reference is not None:
        height = y.at(reference[0], bottom, TOP)
        parts.append(_segment("reference", LEFT, height, right, height))
    ends, labels = [], []
    for i, s in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * DODGE
        places = [(x.at(m.x, LEFT, right) + shift, y.at(m.y, bottom, TOP)) for m in s.marks]
        bars = [(y.at(m.low, bottom, TOP), y.at(m.high, bottom, TOP)) for m in s.marks]
        parts.append(_line(s, places, bars))
        ends.append(places[-1])
        labels.append((s.label, f"label {s.style}"))
    if reference is not None:
        ends.append((right - 4.0, y.at(reference[0], bottom, TOP)))
        labels.append((reference[1], "reference"))
    heights = spread([end[1] for end in ends], TOP + 2, bottom - 4)
    for (label, style), end, height in zip(labels, ends, heights, strict=True):
        parts.append(_label(label, style, end, (right + 14, height)))
    return picture(name, HEIGHT, parts)


def picture(name: str, height: float, parts: Sequence[str]) -> str:
    """``parts`` as one ``<svg>`` of the common width, named for readers who do not see it."""
    box = f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(name, quote=True)}"'
    return f"<svg {box}>{''.join(parts)}</svg>"


def spread(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Moves label heights at least `LINE_GAP` apart, in their order, within ``top`` to ``bottom``.

    >>> spread([100.0, 101.0, 10.0], 0.0, 110.0)
    [96.0, 110.0, 10.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    floor = top
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + LINE_GAP
    ceiling = bottom
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - LINE_GAP
    return placed


def mark(style: str, x: float, y: float) -> str:
    """The shape of a style, centred at ``(x, y)``: every style has its own, so colour alone tells nothing."""
    r = 4.0
    if style == "lamp":
        path = f"M{x:.1f} {y - r:.1f}l{r} {1.8 * r}h{-2 * r}z"
    elif style == "erk":
        path = f"M{x - r + 0.5:.1f} {y - r + 0.5:.1f}h{2 * r - 1}v{2 * r - 1}h{1 - 2 * r}z"
    elif style == "uniform":
        path = f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z"
    elif style == "random":
        return f'<path class="cross {style}" d="M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"/>'
    else:
        return f'<circle class="mark {style}" cx="{x:.1f}" cy="{y:.1f}" r="{r - 0.4}"/>'
    return f'<path class="mark {style}" d="{path}"/>'


def _grid(x: Axis, y: Axis, right: float, bottom: float) -> str:
    parts = []
    for value, label in y.ticks:
        at = y.at(value, bottom, TOP)
        parts.append(_segment("grid", LEFT, at, right, at))
        parts.append(_text(label, LEFT - 7, at + 4, "end"))
    for value, label in x.ticks:
        at = x.at(value, LEFT, right)
        parts.append(_segment("axis", at, bottom, at, bottom + 5))
        parts.append(_text(label, at, bottom + 18, "middle"))
    parts.append(_segment("axis", LEFT, bottom, right, bottom))
    parts.append(_text(x.title, (LEFT + right) / 2, bottom + 37, "middle title"))
    return "".join(parts)


def _line(series: Series, places: list[tuple[float, float]], bars: list[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="line {series.style}" points="{path}"/>']
    for m, (x, y), (low, high) in zip(series.marks, places, bars, strict=True):
        bar = _segment(f"bar {series.style}", x, low, x, high)
        parts.append(f"<g><title>{escape(m.tip)}</title>{bar}{mark(series.style, x, y)}</g>")
    return "".join(parts)


def _label(label: str, style: str, end: tuple[float, float], at: tuple[float, float]) -> str:
    line = _segment("leader", end[0] + 5, end[1], at[0] - 2, at[1])
    return line + _text(label, at[0], at[1] + 4, style)


def _segment(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(text: str, x: float, y: float, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
