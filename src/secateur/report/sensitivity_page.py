"""The page of a sensitivity scan: one self-contained HTML document, made of the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .pages import filled
from .run_charts import number
from .run_findings import percent
from .sensitivity_words import (
    NONE,
    answers,
    digits_of,
    drops_of,
    finite_drops,
    median,
    moves,
    note_of,
    shown,
    sparsity_for,
    title,
)
from .svg import LETTER, STYLES, Mark, Series, line_chart, nice_axis, picture, sparsity_axis, text
from .tables import MOST_ROWS
from .words import printable

if TYPE_CHECKING:
    from secateur.evaluate.sensitivity_facts import Layer, Sensitivity

LONGEST = 46
"""Letters of a layer's name; longer ones are cut in the middle, and told whole when pointed at."""
SLIGHT = 0.02
"""Of the greatest loss; gains up to this share are drawn as nothing lost."""
LABEL = 17
"""Letters of a layer's name beside its line."""
FEW = 3
"""Layers up to which no line for the median is drawn."""
ROW, COLUMN, COUNT, TOP = 24, 68, 78, 26
"""Pixels of the heat map: the height of a row, the width of a sparsity and of the weights, what is above the rows."""


def render(scan: Sensitivity) -> str:
    """The page as one HTML document that loads nothing; names may hold anything, they are escaped."""
    layers = scan.layers[:MOST_ROWS]
    return filled(
        "sensitivity_page.html.j2",
        name=printable(scan.facts.get("name", "Sensitivity")),
        metric=printable(scan.metric),
        title=title(scan),
        answers=answers(scan),
        heat=heat_map(scan, layers),
        curves=curves(scan),
        head=["layer", "weights", "zero before", *(percent(s) for s in scan.sparsities), ""],
        rows=[_values(scan, i, layer) for i, layer in enumerate(layers, 1)],
        left=len(scan.layers) - len(layers),
        facts={printable(k): printable(v) for k, v in scan.facts.items() if k != "name"},
        missed=sum(not layer.measured for layer in scan.layers),
        lost=sum(math.isinf(d) for layer in scan.layers for d in drops_of(scan, layer) if d is not None),
    )


def heat_map(scan: Sensitivity, layers: Sequence[Layer]) -> str:
    """Layers down, sparsities across; the stronger the colour, the more is lost."""
    names = [short(printable(layer.name)) for layer in layers]
    begin = 8 + LETTER * len(str(len(layers)))
    left = begin + 12 + 0.93 * LETTER * max(map(len, names), default=0) + COUNT
    most = max([0.0, *finite_drops(scan)])
    digits = digits_of(scan)
    parts = [text(percent(s), left + (i + 0.5) * COLUMN, 16, "middle title") for i, s in enumerate(scan.sparsities)]
    parts.append(text("weights", left - 12, 16, "end"))
    for i, (layer, name) in enumerate(zip(layers, names, strict=True)):
        y = TOP + i * ROW
        tip = f"<title>{escape(_tip(layer))}</title>"
        parts.append(text(str(i + 1), begin - 8, y + 16, "end"))
        parts.append(f"<g>{tip}{text(name, begin, y + 16, 'title')}</g>")
        parts.append(text(f"{layer.numel:,}", left - 12, y + 16, "end"))
        for j, drop in enumerate(drops_of(scan, layer)):
            parts.append(_cell(drop, most, digits, left + j * COLUMN, y))
    width, height = left + COLUMN * len(scan.sparsities), TOP + ROW * len(layers)
    drawn = picture(f"How much {printable(scan.metric)} each layer loses at each sparsity", height, parts, width)
    return drawn.replace("<svg ", f'<svg style="width:{width:.0f}px" ', 1)


def _tip(layer: Layer) -> str:
    note = note_of(layer)
    return printable(f"{layer.name}: {note}" if note else layer.name)


def _cell(drop: float | None, most: float, digits: int, x: float, y: float) -> str:
    where = f'x="{x + 1:.1f}" y="{y}" width="{COLUMN - 2}" height="{ROW - 2}"'
    words = text(shown(drop, digits), x + COLUMN / 2, y + 16, f"middle cell{' small' if drop == math.inf else ''}")
    if drop is None:
        return f'<rect class="track" {where}/>{words}'
    shade = 1.0 if math.isinf(drop) else math.sqrt(max(drop, 0.0) / most) if most else 0.0
    return f'<rect class="heat" {where} style="fill-opacity:calc({shade:.3f} * var(--heat) + 0.04)"/>{words}'


def curves(scan: Sensitivity) -> str | None:
    """What some layers lose against sparsity, beside the median layer; ``None`` where nothing is finite."""
    values = finite_drops(scan)
    if not values:
        return None
    low, high = min(0.0, *values), max(0.0, *values)
    low = low if -low > SLIGHT * high else 0.0
    beyond = high + ((high - low) or 1.0)  # a line to what is not finite leaves the axis
    digits = digits_of(scan)

    def line(label: str, name: str, style: int, drops: Sequence[float | None]) -> Series:
        found = [(s, d) for s, d in zip(scan.sparsities, drops, strict=True) if d is not None]
        tips = [(s, min(max(d, low), beyond), f"{name} at {percent(s)}: {shown(d, digits)}") for s, d in found]
        return Series(label, style, [Mark(s, y, y, y, tip) for s, y, tip in tips])

    numbers = {layer.name: i for i, layer in enumerate(scan.layers, 1)}
    series = [
        line(f"{numbers[x.name]} {_tail(printable(x.name))}", printable(x.name), i, drops_of(scan, x))
        for i, x in enumerate(picked(scan))
    ]
    if len(scan.layers) > FEW:
        middle = [median(scan, s) for s in scan.sparsities]
        series.append(line("median layer", "median layer", STYLES - 1, middle))
    name = f"{printable(scan.metric)} lost against the sparsity of one layer"
    lost = nice_axis("", low, high, number)
    return line_chart(name, sparsity_axis(scan.sparsities), lost, series)


def picked(scan: Sensitivity) -> list[Layer]:
    """The layers that are drawn as lines: all if they are few; else the first, the last, the most and the least sensitive."""
    at = sparsity_for(scan)
    layers = [layer for layer in scan.layers if layer.measured]
    most = STYLES - 1
    if len(layers) <= most or at is None:
        return layers[:most]
    able = [x for x in layers if scan.drop(x, at) is not None and moves(scan, x)]
    order = sorted(able, key=lambda x: -(scan.drop(x, at) or 0.0))
    wanted = [layers[0], layers[-1], *order[: most - 4], *order[-2:], *order]
    chosen = {x.name for x in list(dict((x.name, x) for x in wanted).values())[:most]}
    return [x for x in layers if x.name in chosen]


def _values(scan: Sensitivity, number: int, layer: Layer) -> list[str]:
    """A row of raw values: the metric itself, not its drop."""
    digits = digits_of(scan)
    points = [layer.at(s) for s in scan.sparsities]
    values = [NONE if p is None else f"{p.metrics[scan.metric]:.{digits}f}" for p in points]
    return [
        f"{number} {printable(layer.name)}",
        f"{layer.numel:,}",
        f"{layer.zeros:,}",
        *values,
        printable(note_of(layer)),
    ]


def short(name: str) -> str:
    """A name cut in the middle, where names of layers differ least.

    >>> short("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight")
    'model.vision_tower.enco…self_attn.q_proj.weight'
    """
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST // 2]}…{name[len(name) - LONGEST // 2 :]}"


def _tail(name: str) -> str:
    """The end of a name, which tells layers apart beside a number.

    >>> _tail("encoder.layer.0.attention.self.query.weight"), _tail("0.weight")
    ('…ntion.self.query', '0')
    """
    name = name.removesuffix(".weight")
    return name if len(name) <= LABEL else f"…{name[1 - LABEL :]}"
