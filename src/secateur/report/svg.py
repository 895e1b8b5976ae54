"""Line charts as inline SVG: axes, series with error bars, labels beside the lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

WIDTH, HEIGHT = 440, 310
LEFT, RIGHT, TOP, BOTTOM = 46, 98, 12, 46
DODGE = 2.2
"""Pixels between the marks of neighbouring series, so that error bars do not cover each other."""
LINE_GAP = 14
"""Pixels between the labels at the ends of the lines."""
STYLES = 8
"""Styles that differ in colour, in the shape of their marks and in their dashes; the last is the grey one."""
LETTER = 7.4
"""Pixels a letter of a label takes, on the wide side."""
BOLD = 8.4
"""Pixels a letter takes beside a line, where it is bold."""
LONGEST = 22
"""Letters of a label; longer ones are cut, and told whole when pointed at."""


Place = tuple[float, float]
"""Pixels from the left and from the top."""


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
    """A line: ``style`` numbers its colour, shape and dashes, ``label`` stands at its end.

    ``drawn`` is how: a ``"line"`` with marks and error bars, one whose errors are ``"shaded"``, one that is ``"bare"``, or a wide
    pale ``"band"`` for others to lie on, without a label.
    """

    label: str
    style: int
    marks: list[Mark]
    drawn: Literal["line", "shaded", "bare", "band"] = "line"


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high``, with ticks; ``place`` maps a value to where it goes, in any unit."""

    title: str
    low: float
    high: float
    ticks: list[tuple[float, str]]
    place: Callable[[float], float] = field(default=lambda v: v)

    def at(self, value: float, start: float, end: float, beyond: bool = False) -> float:
        """Pixel of ``value`` on an axis from ``start`` to ``end``; what lies outside goes to the edge, or ``beyond`` it."""
        low, high = self.place(self.low), self.place(self.high)
        if low == high:
            return (start + end) / 2
        part = (self.place(value if beyond else min(max(value, self.low), self.high)) - low) / (high - low)
        return start + part * (end - start)

    def holds(self, value: float) -> bool:
        """Whether a value is not beyond the ends."""
        return self.low <= value <= self.high

    def cut(self, inside: float, outside: float) -> float:
        """How much of the way from a value on the axis to one beyond it is on the axis, from 0 to 1."""
        edge = self.low if outside < self.low else self.high
        here, there = self.place(inside), self.place(outside)
        return (self.place(edge) - here) / (there - here)


def sparsity_axis(sparsities: Sequence[float]) -> Axis:
    """Sparsities spaced by the logarithm of what is kept, so that 90 to 98 % has room."""
    ticks = [(s, f"{100 * s:g}") for s in sparsities]
    return Axis("% of the weights pruned", min(sparsities), max(sparsities), ticks, lambda s: -math.log10(1 - s))


def nice_axis(title: str, low: float, high: float, show: Callable[[float], str]) -> Axis:
    """A linear axis whose ends and ticks are round numbers around ``low`` to ``high``."""
    if high - low < 1e-9:
        low = high - (abs(high) / 20 or 1.0)
    raw = (high - low) / 6
    base = 10 ** math.floor(math.log10(raw))
    unit = next(m * base for m in (1, 2, 5, 10) if m * base >= raw)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    ticks = [i * unit for i in range(first, last + 1)]
    return Axis(title, ticks[0], ticks[-1], [(t, show(t)) for t in ticks])


def log_axis(title: str, low: float, high: float) -> Axis:
    """A logarithmic axis with ticks at 1, 2 and 5 times the powers of ten; ``low`` and ``high`` are above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    nice = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
    start = max((v for v in nice if v <= low), default=low)
    end = min((v for v in nice if v >= high), default=high)
    ticks = [v for v in nice if start <= v <= end]
    if len(ticks) > 8:
        ticks = [10.0**power for power in range(first, last + 1) if start <= 10.0**power <= end]
    return Axis(title, start, end, [(v, f"{v:g}") for v in ticks], math.log10)


def line_chart(
    name: str, x: Axis, y: Axis, series: Sequence[Series], reference: tuple[float, str] | None = None
) -> str:
    """A chart of several series as one ``<svg>``.

    Args:
        name: what the chart shows, for readers who do not see it.
        x, y: the axes.
        series: drawn in this order; a line ends where it leaves the axis, and what lies beyond is not drawn.
        reference: a height and its label, drawn as a dashed line behind the series.
    """
    named = [s.label for s in series if s.drawn != "band"] + ([reference[1]] if reference is not None else [])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [_grid(x, y, right, bottom)]
    if reference is not None:
        height = y.at(reference[0], bottom, TOP)
        parts.append(_segment("reference", LEFT, height, right, height))
    ends: list[tuple[Place, str, str]] = []
    left: set[Place] = set()
    for i, s in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * DODGE if s.drawn == "line" else 0.0
        runs = _runs(s.marks, x, y, (LEFT + shift, right + shift), bottom)
        if s.drawn == "shaded":
            parts.append(_area(s, x, y, right, bottom))
        kind = "line" if s.drawn == "shaded" else s.drawn
        parts += [f'<polyline class="{kind} {css(s.style)}" points="{_points(run)}"/>' for run in runs]
        if kind == "line":
            parts += [_dot(s.style, m, x.at(m.x, LEFT, right) + shift, y, bottom) for m in s.marks if y.holds(m.y)]
        if s.drawn != "band" and runs:
            left |= {runs[-1][-1]} if not y.holds(s.marks[-1].y) else set()
            ends.append((runs[-1][-1], s.label, f"label {css(s.style)}"))
    if reference is not None:
        ends.append(((right - 4.0, y.at(reference[0], bottom, TOP)), reference[1], "reference"))
    # Of the lines that leave the axis, the one that got farthest comes first.
    ends.sort(key=lambda end: (end[0][1], -end[0][0] if end[0] in left else -math.inf))
    heights = spread([place[1] for place, _, _ in ends], TOP + 2, bottom - 4)
    for (place, label, style), height in zip(ends, heights, strict=True):
        parts.append(_label(label, style, place, (right + 14, height)))
    return picture(name, HEIGHT, parts, right + max(RIGHT, _room(named)))


def css(style: int) -> str:
    """The CSS class of a style; with more series than styles they come round again.

    >>> css(1), css(9)
    ('s1', 's1')
    """
    return f"s{style % STYLES}"


def picture(name: str, height: float, parts: Sequence[str], width: float = WIDTH) -> str:
    """``parts`` as one ``<svg>``, of the common width but for long labels, named for readers who do not see it."""
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(name, quote=True)}"'
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


def mark(style: int, x: float, y: float) -> str:
    """The shape of a style, centred at ``(x, y)``: every style has its own, so colour alone tells nothing."""
    r, kind = 4.0, css(style)
    paths = {
        "s1": f"M{x:.1f} {y - r:.1f}l{r} {1.8 * r}h{-2 * r}z",
        "s2": f"M{x - r + 0.5:.1f} {y - r + 0.5:.1f}h{2 * r - 1}v{2 * r - 1}h{1 - 2 * r}z",
        "s3": f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
        "s4": f"M{x:.1f} {y + r:.1f}l{r} {-1.8 * r}h{-2 * r}z",
        "s5": f"M{x - r:.1f} {y:.1f}h{2 * r}m{-r} {-r}v{2 * r}",
        "s7": f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6",
    }
    if kind in paths:
        drawn = "cross" if kind in ("s5", "s7") else "mark"
        return f'<path class="{drawn} {kind}" d="{paths[kind]}"/>'
    drawn = "ring" if kind == "s6" else "mark"
    return f'<circle class="{drawn} {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r - 0.4}"/>'


def _grid(x: Axis, y: Axis, right: float, bottom: float) -> str:
    parts = []
    for value, label in y.ticks:
        at = y.at(value, bottom, TOP)
        parts.append(_segment("grid", LEFT, at, right, at))
        parts.append(text(label, LEFT - 7, at + 4, "end"))
    free = math.inf
    for value, label in reversed(x.ticks):
        at = x.at(value, LEFT, right)
        parts.append(_segment("axis", at, bottom, at, bottom + 5))
        half = LETTER * len(label) / 2
        if at + half <= free:
            parts.append(text(label, at, bottom + 18, "middle"))
            free = at - half - 4
    parts.append(_segment("axis", LEFT, bottom, right, bottom))
    parts.append(text(x.title, (LEFT + right) / 2, bottom + 37, "middle title"))
    return "".join(parts)


def _runs(marks: Sequence[Mark], x: Axis, y: Axis, across: tuple[float, float], bottom: float) -> list[list[Place]]:
    """The stretches of a line that lie on the axis, in pixels, cut where it leaves or enters."""
    places = [(x.at(m.x, *across), y.at(m.y, bottom, TOP)) for m in marks]
    runs: list[list[Place]] = []
    for i, m in enumerate(marks):
        before = marks[i - 1] if i else None
        if before is None or not y.holds(before.y):
            if y.holds(m.y):
                runs.append(
                    [places[i]] if before is None else [_edge(m, before, places[i], places[i - 1], y), places[i]]
                )
        elif y.holds(m.y):
            runs[-1].append(places[i])
        else:
            runs[-1].append(_edge(before, m, places[i - 1], places[i], y))
    return runs


def _edge(inside: Mark, outside: Mark, here: Place, there: Place, y: Axis) -> Place:
    """Where the line between two marks crosses the end of the axis; ``there`` is at that end already."""
    return here[0] + y.cut(inside.y, outside.y) * (there[0] - here[0]), there[1]


def _points(places: Sequence[Place]) -> str:
    """Places as SVG writes them.

    >>> _points([(1.0, 2.25), (3.0, 4.0)])
    '1.0,2.2 3.0,4.0'
    """
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _area(s: Series, x: Axis, y: Axis, right: float, bottom: float) -> str:
    """What lies between the ends of the errors, in a window that is the axis."""
    above = [(x.at(m.x, LEFT, right), y.at(m.high, bottom, TOP, beyond=True)) for m in s.marks]
    below = [(x.at(m.x, LEFT, right), y.at(m.low, bottom, TOP, beyond=True)) for m in reversed(s.marks)]
    wide, tall = right - LEFT, bottom - TOP
    window = f'x="{LEFT}" y="{TOP}" width="{wide}" height="{tall}" viewBox="{LEFT} {TOP} {wide} {tall}"'
    shape = f'<polygon class="area {css(s.style)}" points="{_points([*above, *below])}"/>'
    return f'<svg {window} style="width:{wide}px;height:{tall}px">{shape}</svg>'


def _dot(style: int, m: Mark, x: float, y: Axis, bottom: float) -> str:
    bar = _segment(f"bar {css(style)}", x, y.at(m.low, bottom, TOP), x, y.at(m.high, bottom, TOP))
    return f"<g><title>{escape(m.tip)}</title>{bar}{mark(style, x, y.at(m.y, bottom, TOP))}</g>"


def _room(labels: Sequence[str]) -> float:
    """Pixels that the labels at the ends of the lines need."""
    return 14 + BOLD * min(LONGEST, max(map(len, labels), default=0))


def _label(label: str, style: str, end: tuple[float, float], at: tuple[float, float]) -> str:
    line = _segment("leader", end[0] + 5, end[1], at[0] - 2, at[1])
    if len(label) <= LONGEST:
        return line + text(label, at[0], at[1] + 4, style)
    return f"<g><title>{escape(label)}</title>{line}{text(label[: LONGEST - 1] + '…', at[0], at[1] + 4, style)}</g>"


def _segment(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(words: str, x: float, y: float, style: str) -> str:
    """Words at a place, escaped."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'
