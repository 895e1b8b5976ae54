"""The page's charts, each made from the summary it shows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from examples.first_cut.settings import METHODS, REFERENCE
from examples.first_cut.summary import Layer, Network, Point
from examples.first_cut.words import NAMES, STYLES, percent, points, span
from secateur.evaluate.statistics import Interval
from secateur.report.svg import WIDTH, Axis, Mark, Series, css, line_chart, nice_axis, picture, sparsity_axis
from secateur.report.words import share, signed

SHARE = Axis("", 0.0, 1.0, [(t / 5, f"{20 * t}%") for t in range(6)])
MATRICES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention out",
    "intermediate.dense": "MLP in",
    "output.dense": "MLP out",
}
"""The weight matrices of one encoder block and what people call them."""


def ends(value: Interval) -> tuple[float, float]:
    """Where an interval's error bar begins and ends."""
    half = value.half or 0.0
    return value.mean - half, value.mean + half


def accuracy_chart(network: Network, shown: Callable[[Point], Interval | None], dense: Interval, when: str) -> str:
    """Test accuracy against sparsity, a line a method."""
    series = []
    for method in METHODS:
        marks = []
        for p in network.points[method]:
            value = shown(p)
            if value is not None:
                tip = f"{NAMES[method]}, {share(p.sparsity, 0)} pruned: {percent(value)}"
                marks.append(Mark(p.sparsity, value.mean, *ends(value), tip))
        series.append(Series(NAMES[method], STYLES[method], marks))
    name = f"{network.title}: test accuracy {when} against sparsity"
    axis = sparsity_axis([p.sparsity for p in network.points[REFERENCE]])
    return line_chart(name, axis, SHARE, series, (dense.mean, f"dense {share(dense.mean)}"))


def difference_chart(network: Network) -> str:
    """Accuracy minus that of global on the same weights, for the other allocations."""
    series, low, high = [], 0.0, 0.0
    for method in METHODS:
        if method in (REFERENCE, "random"):
            continue
        marks = []
        for p in network.points[method]:
            tip = f"{NAMES[method]} minus global at {share(p.sparsity, 0)}: {points(p.minus_global)} points"
            marks.append(Mark(p.sparsity, p.minus_global.mean, *ends(p.minus_global), tip))
        series.append(Series(NAMES[method], STYLES[method], marks))
        low = min(low, *(m.low for m in marks))
        high = max(high, *(m.high for m in marks))
    y = nice_axis("", max(low, -1.0), min(high, 1.0), lambda v: signed(100 * v, 0))
    x = sparsity_axis([p.sparsity for p in network.points[REFERENCE]])
    return line_chart(f"{network.title}: accuracy minus global, in points", x, y, series, (0.0, "global"))


def flops_chart(network: Network) -> str:
    """Accuracy against the multiplications left, for every allocation of magnitude."""
    series = []
    for method in METHODS:
        if method == "random":
            continue
        marks = []
        for p in network.points[method]:
            work = f"{share(p.flops.mean)} of the FLOPs left"
            tip = f"{NAMES[method]}, {share(p.sparsity, 0)} pruned, {work}: {percent(p.final)}"
            marks.append(Mark(1 - p.flops.mean, p.final.mean, *ends(p.final), tip))
        series.append(Series(NAMES[method], STYLES[method], marks))
    removed = [m.x for s in series for m in s.marks]
    axis = sparsity_axis([min(removed), max(removed)])
    round_numbers = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
    inside = [t for t in round_numbers if axis.low - 0.005 < t < axis.high + 0.005]
    x = Axis("% of the FLOPs saved", axis.low, axis.high, [(t, f"{100 * t:g}") for t in inside], axis.place)
    dense = network.dense_after or network.dense
    reference = (dense.mean, f"dense {share(dense.mean)}")
    return line_chart(f"{network.title}: accuracy against FLOPs", x, SHARE, series, reference)


def layer_bars(network: Network) -> str:
    """The share of every layer that each allocation prunes, as bars from 0 to 100 %."""
    methods = [m for m in METHODS if m != "random"]
    row, gap, left, right = 15, 12, 52, WIDTH - 112
    parts, y = [], 4.0
    rows: Sequence[tuple[Layer, ...]] = list(zip(*(network.layers[m] for m in methods), strict=True))
    for layers in rows:
        parts.append(f'<text class="title" x="0" y="{y + 12:.0f}">{escape(layers[0].name)}</text>')
        parts.append(f'<text class="small" x="0" y="{y + 27:.0f}">{layers[0].numel:,}</text>')
        for method, layer in zip(methods, layers, strict=True):
            width = layer.sparsity.mean * (right - left)
            style = css(STYLES[method])
            tip = f"{NAMES[method]}, {layer.name}: {percent(layer.sparsity)} pruned"
            parts.append(
                f"<g><title>{escape(tip)}</title>"
                f'<rect class="track" x="{left}" y="{y:.1f}" width="{right - left}" height="{row - 3}"/>'
                f'<rect class="fill {style}" x="{left}" y="{y:.1f}" width="{width:.1f}" height="{row - 3}"/>'
                f'<text class="label {style}" x="{right + 6}" y="{y + 10:.1f}">'
                f"{share(layer.sparsity.mean)} {escape(NAMES[method])}</text></g>"
            )
            y += row
        y += gap
    name = f"{network.title}: share of each layer pruned by each allocation"
    return picture(name, y, parts)


def score_chart(encoder: dict[str, Any], test: str, title: str) -> str:
    """One of the encoder's scores against sparsity, with bootstrap intervals."""
    dense = encoder["dense"][test]
    series, low, high = [], dense["low"], dense["high"]
    for method in ("global", "uniform"):
        marks = [Mark(0.0, dense["score"], dense["low"], dense["high"], f"dense: {span(dense)}")]
        for r in encoder["runs"]:
            if r["method"] == method:
                s = r["scores"][test]
                tip = f"{method}, {share(r['asked'], 0)} pruned: {span(s)}"
                marks.append(Mark(r["asked"], s["score"], s["low"], s["high"], tip))
        series.append(Series(NAMES[method], STYLES[method], marks))
        low, high = min(low, *(m.low for m in marks)), max(high, *(m.high for m in marks))
    asked = [m.x for m in series[0].marks]
    x = Axis("% of the linear weights pruned", min(asked), max(asked), [(s, f"{100 * s:g}") for s in asked])
    y = nice_axis("", low, high, lambda v: f"{v:.2f}".rstrip("0").rstrip(".") if v else "0")
    reference = (dense["score"], f"dense {dense['score']:.3f}")
    return line_chart(f"{encoder['title']}: {title} against sparsity", x, y, series, reference)


def encoder_grid(layers: Sequence[dict[str, Any]]) -> str:
    """Every weight matrix of the encoder as a cell with its sparsity: blocks across, kinds of matrix down."""
    cells = {}
    for layer in layers:
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", layer["name"])
        if match is not None and match[2] in MATRICES:
            cells[match[2], int(match[1])] = layer["sparsity"]
    blocks = sorted({block for _, block in cells})
    low, high = min(cells.values()), max(cells.values())
    left, top, tall = 92, 26, 30
    wide = (WIDTH - left) / len(blocks)
    parts = []
    for column, block in enumerate(blocks):
        x = left + column * wide
        parts.append(f'<text class="middle title" x="{x + wide / 2:.1f}" y="16">block {block}</text>')
        means = [cells[kind, block] for kind in MATRICES]
        values = [*means, math.fsum(means) / len(means)]
        for line, value in enumerate(values):
            y = top + line * tall + (6 if line == len(MATRICES) else 0)
            shade = (value - low) / (high - low) if high > low else 0.0
            parts.append(
                f'<rect class="heat" x="{x + 1:.1f}" y="{y}" width="{wide - 2:.1f}" height="{tall - 2}" '
                f'style="fill-opacity:calc({shade:.3f} * var(--heat) + 0.04)"/>'
                f'<text class="middle cell" x="{x + wide / 2:.1f}" y="{y + 18}">{share(value, 0)}</text>'
            )
    for line, label in enumerate([*MATRICES.values(), "mean"]):
        y = top + line * tall + (6 if line == len(MATRICES) else 0)
        parts.append(f'<text class="end title" x="{left - 8}" y="{y + 18}">{escape(label)}</text>')
    height = top + (len(MATRICES) + 1) * tall + 8
    return picture("Sparsity of every weight matrix of the encoder under the global allocation", height, parts)
