"""The charts of a run's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from secateur.evaluate.statistics import Interval

from .run_facts import DENSE, Log, Metric
from .run_findings import percent, written, written_difference
from .svg import Axis, Mark, Series, line_chart, log_axis, nice_axis, sparsity_axis
from .words import MINUS, share

MOST_POINTS = 400
"""Points of a line over steps; a screen shows no more."""
MOST_LINES = 8
"""Lines of a chart over steps."""
MOST_MARKS = 40
"""Layers up to which each has its own mark."""
STEEP = 20.0
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""


def metric_chart(
    metric: Metric, styles: dict[str, int], asked: Sequence[float], drawn: Literal["line", "shaded"] = "line"
) -> str:
    """The metric against sparsity, a line a method, dense as a line across."""

    def tip(method: str, at: float, value: Interval) -> str:
        return f"{method}, {percent(at)} pruned: {metric.name} {written(value, metric)}"

    series = [replace(s, drawn=drawn) for s in series_of(styles, asked, metric.mean, tip)]
    dense = metric.mean(DENSE, 0.0)
    ends = [edge for s in series for m in s.marks for edge in (m.low, m.high)] + ([dense.mean] if dense else [])
    y = axis_of(metric, ends)
    reference = (dense.mean, f"dense {dense.mean:.{metric.digits}f}{metric.unit}") if dense else None
    return line_chart(f"{metric.name} against sparsity", sparsity_axis(asked), y, series, reference)


def axis_of(metric: Metric, ends: Sequence[float]) -> Axis:
    """An axis for a metric that holds so high and so low values."""
    low, high = min(ends), max(ends)
    if metric.unit:  # an interval may leave what per cent can be, the axis does not
        low, high = max(low, 0.0), min(high, 100.0)
    return nice_axis("", low, high, lambda v: f"{number(v)}{metric.unit}")


def difference_chart(metric: Metric, styles: dict[str, int], asked: Sequence[float]) -> str | None:
    """The metric minus dense's, seed by seed, near enough to tell the two best methods of each sparsity apart."""

    def minus_dense(method: str, at: float) -> Interval | None:
        return metric.minus((method, at), (DENSE, 0.0))

    def tip(method: str, at: float, value: Interval) -> str:
        return f"{method}, {percent(at)} pruned: {written_difference(value, metric)}{metric.points} against dense"

    series = series_of(styles, asked, minus_dense, tip)
    if not series:
        return None
    best = [(m, a) for a in asked for m in metric.ranked(list(styles), a)[:2]]
    whole = [m for s in series for m in s.marks if (s.label, m.x) in best]
    low, high = min([0.0, *(m.low for m in whole)]), max([0.0, *(m.high for m in whole)])
    y = nice_axis("", low, high, number)
    return line_chart(f"{metric.name} minus dense", sparsity_axis(asked), y, series, (0.0, "dense"))


def series_of(
    styles: dict[str, int],
    asked: Sequence[float],
    value: Callable[[str, float], Interval | None],
    tip: Callable[[str, float, Interval], str],
) -> list[Series]:
    """A line a method through the sparsities where it has a value."""
    found = []
    for method, style in styles.items():
        marks = []
        for at in asked:
            v = value(method, at)
            if v is not None:
                half = v.half or 0.0
                marks.append(Mark(at, v.mean, v.mean - half, v.mean + half, tip(method, at, v)))
        if marks:
            found.append(Series(method, style, marks))
    return found


def layer_chart(layers: dict[str, dict[str, float]], names: Sequence[str], styles: dict[str, int]) -> str:
    """The sparsity of every layer, in the order of the model, a line a method."""
    series = []
    for method, by_name in layers.items():
        found = [(i, n, by_name[n]) for i, n in enumerate(names, 1) if n in by_name]
        marks = [Mark(i, v, v, v, f"{method}, {n}: {share(v, 2)}") for i, n, v in found]
        series.append(Series(method, styles[method], marks, "line" if len(names) <= MOST_MARKS else "bare"))
    values = [m.y for s in series for m in s.marks]
    high = max(*values, 0.02)
    y = nice_axis("", max(0.0, min(*values, high - 0.02)), high, percent)
    step = math.ceil(len(names) / 12)
    x = Axis("layer, numbered as in the table", 1, len(names), [(i, str(i)) for i in range(1, len(names) + 1, step)])
    return line_chart("sparsity of each layer", x, y, series)


def loss_chart(method: str, logs: Sequence[Log]) -> str | None:
    """The training loss of a method over its steps, mean over seeds; ``None`` where no loss is finite."""
    series = _over_steps(method, logs, lambda log: log.loss, "bare")
    if not series:
        return None
    values = [m.y for s in series for m in s.marks]
    low, high = min(values), max(values)
    y = log_axis("", low, high) if low > 0 and high / low > STEEP else nice_axis("", low, high, number)
    return line_chart(f"{method}: training loss over steps", _step_axis(series), y, series)


def schedule_chart(method: str, logs: Sequence[Log]) -> str | None:
    """The sparsity asked, as a band, and reached, as a line on it; ``None`` where neither ever changes."""
    asked = _over_steps(method, logs, lambda log: log.asked, "band")
    found = _over_steps(method, logs, lambda log: log.found, "bare")
    series = [*asked, *found]
    if not any(len({m.y for m in s.marks}) > 1 for s in series):
        return None
    y = nice_axis("", 0.0, max(m.y for s in series for m in s.marks), percent)
    return line_chart(f"{method}: sparsity asked and reached over steps", _step_axis(series), y, series)


def trainings(method: str, logs: Sequence[Log]) -> dict[str, list[tuple[int, Log]]]:
    """The logs of a method by what they were for, each with the step it begins at.

    A log for a sparsity is a training of its own. All others are stretches of one, and follow each other.
    """
    found: dict[str, list[tuple[int, Log]]] = {}
    done: dict[int, int] = {}
    for log in logs:
        try:
            label = method if method == DENSE else percent(float(log.what))
            found.setdefault(label, []).append((0, log))
        except ValueError:
            found.setdefault("all rounds", []).append((done.get(log.seed, 0), log))
            done[log.seed] = done.get(log.seed, 0) + max(log.steps, default=0)
    return found


def thin(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """Means of steps and values, both ``(n,)``, over ``most`` buckets at most, each of equally many steps.

    Values that are not finite are left out.

    >>> thin(np.arange(1.0, 5.0), np.array([1.0, 3.0, 5.0, 7.0]), most=2)
    ([1.5, 3.5], [2.0, 6.0])
    """
    x, y = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(x):
        return [], []
    width = math.ceil((x.max() - x.min() + 1) / most)
    bucket = ((x - x.min()) // width).astype(np.int64)
    count = np.bincount(bucket)
    kept = count > 0
    means = (np.bincount(bucket, weights=v)[kept] / count[kept] for v in (x, y))
    at, mean = (m.tolist() for m in means)
    return at, mean


def _over_steps(
    method: str, logs: Sequence[Log], read: Callable[[Log], Sequence[float]], drawn: Literal["bare", "band"]
) -> list[Series]:
    """A line a training; of many, some that are spread over all."""
    by_label = list(trainings(method, logs).items())
    if len(by_label) > MOST_LINES:
        by_label = [by_label[round(i * (len(by_label) - 1) / (MOST_LINES - 1))] for i in range(MOST_LINES)]
    series = []
    for style, (label, parts) in enumerate(by_label):
        steps = np.concatenate([np.asarray(log.steps, np.float64) + begin for begin, log in parts])
        at, mean = thin(steps, np.concatenate([np.asarray(read(log), np.float64) for _, log in parts]))
        if at:
            marks = [Mark(x, y, y, y, "") for x, y in zip(at, mean, strict=True)]
            series.append(Series(label, style, marks, drawn))
    return series


def _step_axis(series: Sequence[Series]) -> Axis:
    last = max(m.x for s in series for m in s.marks)
    return nice_axis("steps", 0.0, last, lambda v: f"{v / 1000:g}k" if v and last >= 10_000 else f"{v:g}")


def number(value: float) -> str:
    """A tick of an axis.

    >>> number(0.1 + 0.2), number(-2.0).replace(MINUS, "-"), number(1e5)
    ('0.3', '-2', '100,000')
    """
    return f"{round(value, 10) + 0.0:,.6g}".replace("-", MINUS)
