"""The charts of a comparison's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from secateur.evaluate.statistics import Interval

from .run_charts import axis_of, metric_chart, number, series_of
from .run_facts import DENSE
from .run_findings import percent, written, written_difference
from .svg import Mark, Series, line_chart, log_axis, nice_axis, sparsity_axis

if TYPE_CHECKING:
    from secateur.evaluate.compare import Comparison, Point

Cost = Literal["density", "work"]
FRONT = 7
"""The style of the front: the grey one."""


def styles_of(c: Comparison) -> dict[str, int]:
    """A style a method, the same in every chart."""
    return {m: i for i, m in enumerate(c.methods)}


def against_sparsity(c: Comparison) -> str:
    """The metric against sparsity."""
    return metric_chart(c.metric, styles_of(c), c.asked, "shaded")


def differences(c: Comparison) -> str:
    """Each method minus the baseline; near enough to see those that come close to it, lines of others may leave."""
    verdicts = {(v.method, v.asked): v for v in c.verdicts}

    def value(method: str, asked: float) -> Interval | None:
        v = verdicts.get((method, asked))
        return None if v is None else v.difference

    def tip(method: str, asked: float, d: Interval) -> str:
        shown = f"{written_difference(d, c.metric)}{c.metric.points}"
        return f"{method}, {percent(asked)} pruned: {shown}: {verdicts[method, asked].word}"

    styles = {m: s for m, s in styles_of(c).items() if m != c.baseline}
    series = series_of(styles, c.asked, value, tip)
    near = _near(series)
    low, high = min([0.0, *(m.low for m in near)]), max([0.0, *(m.high for m in near)])
    return line_chart(
        f"{c.metric.name} minus {c.baseline}",
        sparsity_axis(c.asked),
        nice_axis("", low, high, number),
        series,
        (0.0, c.baseline),
    )


def _near(series: Sequence[Series]) -> list[Mark]:
    """Of each sparsity the mark that is closest to zero."""
    at: dict[float, list[Mark]] = {}
    for s in series:
        for m in s.marks:
            at.setdefault(m.x, []).append(m)
    return [min(marks, key=lambda m: abs(m.y)) for marks in at.values()]


def against_cost(c: Comparison, cost: Cost) -> str | None:
    """The metric against how many times smaller the network is, or how much less work it does; the front is the pale line.

    The axis holds dense and the baseline; lines of others may leave it.
    """

    def times(p: Point) -> float | None:
        return p.compression if cost == "density" else p.speedup

    def mark(p: Point, value: Interval, x: float) -> Mark:
        half = value.half or 0.0
        name = f"{p.method}, {percent(p.asked)} pruned" if p.asked else p.method
        tip = f"{name}: {x:.3g}× less, {c.metric.name} {written(value, c.metric)}"
        return Mark(x, value.mean, value.mean - half, value.mean + half, tip)

    known = [(p, mark(p, p.value, x)) for p in c.points if p.value is not None and (x := times(p)) is not None]
    pruned = [(p, m) for p, m in known if p.method != DENSE]
    if not pruned:
        return None
    ahead = sorted((m for p, m in known if (p.by_density if cost == "density" else p.by_work)), key=lambda m: m.x)
    lines = [Series("", FRONT, ahead, "band")] if len(ahead) > 1 else []
    for method, style in styles_of(c).items():
        marks = sorted((m for p, m in pruned if p.method == method), key=lambda m: m.x)
        if marks:
            lines.append(Series(method, style, marks, "shaded"))
    dense = next((m for p, m in known if p.method == DENSE), None)
    xs = [m.x for _, m in known]
    title = "times fewer parameters" if cost == "density" else "times fewer FLOPs, in theory"
    y = axis_of(c.metric, [edge for p, m in known if p.method in (DENSE, c.baseline) for edge in (m.low, m.high)])
    reference = None if dense is None else (dense.y, f"dense {dense.y:.{c.metric.digits}f}{c.metric.unit}")
    return line_chart(f"{c.metric.name} against {title}", log_axis(title, min(xs), max(xs)), y, lines, reference)
