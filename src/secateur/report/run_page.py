"""The page of a run of a recipe: one self-contained HTML document, made of the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from secateur.evaluate.statistics import Interval, interval

from . import run_charts as charts
from .pages import filled
from .run_facts import DENSE, Cell, Log, Metric, RunFacts, in_order, methods, metrics, safe, sparsities
from .run_findings import find_best, headline, percent, sentence, written, written_difference
from .tables import MOST_ROWS
from .words import share

OPEN_ROWS = 16
"""Rows of a table that is shown open; longer ones are folded."""


def render(run: RunFacts) -> str:
    """The page as one HTML document that loads nothing.

    Numbers that are not finite are left out of charts and means, and counted on the page.

    Args:
        run: what was run, as plain data; names may hold anything, they are escaped.

    Returns:
        The document's text.

    Example:
        >>> dense, pruned = Cell(0, "dense", 0.0, 0.0, {"accuracy": 98.0}, 5), Cell(0, "GMP", 0.9, 0.9, {"accuracy": 97.5}, 5)
        >>> page = render(RunFacts("A run", "", "", [dense, pruned], percent=["accuracy"]))
        >>> "accuracy 97.50%, 0.50 points below dense; one seed tells no difference apart." in page
        True
    """
    run = safe(run)
    every = metrics(run)
    first = every[0] if every else None
    best = find_best(run, first) if first else []
    styles = {m: i for i, m in enumerate(methods(run))}
    asked = sparsities(run)
    return filled(
        "run_page.html.j2",
        run=run,
        metric=first,
        seeds=in_order(str(c.seed) for c in run.cells),
        headline=headline(best, first),
        answers=[{"asked": percent(b.asked), "said": sentence(b, first)} for b in best] if first else [],
        compared=len(asked) * len(styles),
        main=_main(first, styles, asked) if first and best else [],
        tables=[t for m in every for t in _tables(run, m, ahead=m is first)],
        sums=[_table(run, "Sparsity reached", _reached), _table(run, "Epochs of training spent", _epochs)],
        cells=_every_cell(run, every),
        trainings=_trainings(run),
        logged=_logged(run),
        layers=_layers(run, styles),
        lost=_not_finite(run),
        open_rows=OPEN_ROWS,
        most_points=charts.MOST_POINTS,
        most_lines=charts.MOST_LINES,
    )


def _figure(caption: str, svg: str | None) -> list[dict[str, str]]:
    """A chart and the words above it, in a list that is empty where there is no chart."""
    return [] if svg is None else [{"caption": caption, "svg": svg}]


def _main(metric: Metric, styles: dict[str, int], asked: Sequence[float]) -> list[dict[str, str]]:
    name = metric.name[:1].upper() + metric.name[1:]
    unit = ", in points" if metric.unit else ""
    return [
        *_figure(f"{name} against sparsity", charts.metric_chart(metric, styles, asked)),
        *_figure(f"{name} minus dense{unit}, close up", charts.difference_chart(metric, styles, asked)),
    ]


def _table(run: RunFacts, title: str, show: Callable[[list[Cell]], str]) -> dict[str, Any]:
    """A row a method, a column a sparsity; ``show`` gets the cells of all seeds."""
    at: dict[tuple[str, float], list[Cell]] = {}
    for c in run.cells:
        at.setdefault((c.method, c.asked), []).append(c)
    asked = sparsities(run)
    rows = [[m, *(show(at[m, a]) if (m, a) in at else "" for a in asked)] for m in methods(run)]
    return {"title": title, "head": ["", *(percent(a) for a in asked)], "rows": rows, "best": []}


def _reached(cells: Sequence[Cell]) -> str:
    low, high = min(c.sparsity for c in cells), max(c.sparsity for c in cells)
    return share(low, 3) if share(low, 3) == share(high, 3) else f"{share(low, 3)} to {share(high, 3)}"


def _epochs(cells: Sequence[Cell]) -> str:
    return f"{interval([c.epochs for c in cells]).mean:g}"


def _tables(run: RunFacts, metric: Metric, ahead: bool) -> list[dict[str, Any]]:
    """A metric's means, with the best of each sparsity where that is asked, and its differences from dense."""
    names, asked = methods(run), sparsities(run)
    if not asked:
        return []
    dense = metric.mean(DENSE, 0.0)
    title = metric.name if dense is None else f"{metric.name} (dense {written(dense, metric)})"
    best = [(metric.ranked(names, a) or [""])[0] for a in asked] if ahead else []

    def rows(show: Callable[[str, float], str]) -> list[list[str]]:
        return [[m, *(show(m, a) for a in asked)] for m in names]

    head = ["", *(percent(a) for a in asked)]
    means = {"title": title, "head": head, "rows": rows(lambda m, a: _or_empty(metric.mean(m, a), metric, written))}
    minus = rows(lambda m, a: _or_empty(metric.minus((m, a), (DENSE, 0.0)), metric, written_difference))
    unit = ", in points" if metric.unit else ""
    return [
        {**means, "best": best},
        {"title": f"{metric.name} minus dense, seed by seed{unit}", "head": head, "rows": minus, "best": []},
    ]


def _or_empty(value: Interval | None, metric: Metric, show: Callable[[Interval, Metric], str]) -> str:
    return "" if value is None else show(value, metric)


def _every_cell(run: RunFacts, every: Sequence[Metric]) -> dict[str, Any]:
    """A row a cell."""
    rows = []
    for c in run.cells:
        values = [m.scores.get((c.method, c.asked), {}).get(c.seed) for m in every]
        shown = ["" if v is None else f"{v:.{m.digits}f}{m.unit}" for v, m in zip(values, every, strict=True)]
        rows.append([c.method, str(c.seed), percent(c.asked), share(c.sparsity, 4), f"{c.epochs:g}", *shown])
    head = ["", "seed", "asked", "reached", "epochs", *(m.name for m in every)]
    return {"title": "", "head": head, "rows": rows, "best": []}


def _by_method(run: RunFacts) -> dict[str, list[Log]]:
    found: dict[str, list[Log]] = {}
    for log in run.logs:
        found.setdefault(log.method, []).append(log)
    return found


def _trainings(run: RunFacts) -> list[dict[str, str]]:
    """The charts over steps."""
    found = []
    for method, logs in _by_method(run).items():
        found += _figure(f"{method}: training loss", charts.loss_chart(method, logs))
        found += _figure(f"{method}: sparsity asked (band) and reached (line)", charts.schedule_chart(method, logs))
    return found


def _logged(run: RunFacts) -> dict[str, Any]:
    """A row a method and a training: where schedule and network ended, and how far they ever were apart."""
    rows = []
    for method, logs in _by_method(run).items():
        for label, parts in charts.trainings(method, logs).items():
            of_seed = [log for _, log in parts if log.seed == parts[0][1].seed and log.asked]
            if of_seed and method != DENSE:
                apart = max(float(np.abs(np.subtract(log.asked, log.found)).max()) for _, log in parts if log.asked)
                steps = sum(max(log.steps, default=0) for log in of_seed)
                last = of_seed[-1]
                ends = [share(last.asked[-1], 3), share(last.found[-1], 3)]
                rows.append([method, label, f"{steps:,}", *ends, f"{100 * apart:.3f}"])
    head = ["", "training", "steps", "asked at the end", "reached", "most they differed, points"]
    return {"title": "Schedules", "head": head, "rows": rows, "best": []}


def _layers(run: RunFacts, styles: dict[str, int]) -> dict[str, Any] | None:
    """Every layer at the highest sparsity for which layers are known; ``None`` where none are."""
    known = [c for c in run.cells if c.layers and c.method in styles]
    if not known:
        return None
    asked = max(c.asked for c in known)
    names = in_order(n for c in known for n in c.layers)
    means: dict[str, dict[str, float]] = {}
    for m in styles:
        of = [c.layers for c in known if c.method == m and c.asked == asked]
        by_name = {n: [layers[n] for layers in of if n in layers] for n in names}
        if of:
            means[m] = {n: interval(values).mean for n, values in by_name.items() if values}
    values = [v for by_name in means.values() for v in by_name.values()]
    low, span = min(values), (max(values) - min(values)) or 1.0
    rows = [
        {"name": n, "cells": [_heat(means[m].get(n), low, span) for m in means], "number": i}
        for i, n in enumerate(names[:MOST_ROWS], 1)
    ]
    chart = _figure(f"Sparsity of each layer at {percent(asked)}", charts.layer_chart(means, names, styles))
    left = len(names) - len(rows)
    return {"asked": percent(asked), "methods": list(means), "rows": rows, "chart": chart, "left": left}


def _heat(value: float | None, low: float, span: float) -> dict[str, str]:
    """A cell of the heat table: what it says, and how dark it is, from 0 to 1."""
    if value is None:
        return {"text": "", "shade": "0"}
    return {"text": share(value, 2), "shade": f"{(value - low) / span:.3f}"}


def _not_finite(run: RunFacts) -> int:
    """How many numbers the page leaves out."""
    scores = sum(not math.isfinite(v) for c in run.cells for v in c.metrics.values())
    return scores + sum(int((~np.isfinite(log.loss)).sum()) for log in run.logs)
