"""The page of a comparison: one self-contained HTML document, made of the numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.evaluate.statistics import interval

from . import compare_charts as charts
from . import compare_words as words
from .run_facts import DENSE
from .run_findings import percent, written, written_difference
from .words import printable

if TYPE_CHECKING:
    from secateur.evaluate.compare import Comparison, Point, Verdict

SIGNS = {"better": "▲", "worse": "▼", "no difference shown": "=", "no verdict": "?"}


def render(
    c: Comparison, name: str, about: str, facts: Mapping[str, str], notes: Sequence[str] = (), recipe: str = ""
) -> str:
    """The page as one HTML document that loads nothing.

    Args:
        c: the comparison.
        name, about: its title, and a sentence or two.
        facts, notes, recipe: how it was run, what is to be kept in mind, the text of the recipe; all are escaped.

    Returns:
        The document's text.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # for those who compare

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    broken = [r for r in c.rules if not r.kept]
    return environment.get_template("compare_page.html.j2").render(
        c=c,
        name=printable(name),
        about=printable(about),
        facts={printable(k): printable(v) for k, v in facts.items()},
        notes=[printable(n) for n in notes],
        recipe="\n".join(printable(line) for line in recipe.splitlines()),
        headline=words.headline(c),
        answers=[{"asked": asked, "said": said} for asked, said in words.by_sparsity(c)],
        methods=words.by_method(c),
        matrix=_matrix(c),
        sparsities=[percent(a) for a in c.asked],
        main=_figures(c),
        front=words.on_front(c),
        rules=[*broken, *(r for r in c.rules if r.kept)],
        broken=len(broken),
        values=_values(c),
        costs=_costs(c),
        every=_every(c),
    )


def _matrix(c: Comparison) -> list[dict[str, Any]]:
    """A row a method, a cell a sparsity: the verdict, and the difference from the baseline."""
    at = {(v.method, v.asked): v for v in c.verdicts}
    return [
        {"method": m, "cells": [_verdict(c, at.get((m, a))) for a in c.asked]} for m in c.methods if m != c.baseline
    ]


def _verdict(c: Comparison, v: Verdict | None) -> dict[str, str]:
    if v is None:
        return {"sign": "", "kind": "", "said": "", "difference": ""}
    kind = v.word if v.word in ("better", "worse") else "open"
    doubt = "" if kind == "open" or v.holm else " (not by Holm)"
    return {
        "sign": SIGNS[v.word], "kind": kind, "said": f"{v.word}{doubt}", "difference": written_difference(v.difference, c.metric)
    }  # fmt: skip


def _figures(c: Comparison) -> list[dict[str, str]]:
    name = c.metric.name[:1].upper() + c.metric.name[1:]
    points = ", in points" if c.metric.unit else ""
    drawn = {
        f"{name} minus {c.baseline}{points}, close up": charts.differences(c),
        f"{name} against sparsity": charts.against_sparsity(c),
        f"{name} against parameters": charts.against_cost(c, "density"),
        f"{name} against FLOPs": charts.against_cost(c, "work"),
    }
    return [{"caption": caption, "svg": svg} for caption, svg in drawn.items() if svg is not None]


def _values(c: Comparison) -> list[dict[str, Any]]:
    """The metric and its difference from dense, a row a method, a column a sparsity."""
    at = {(p.method, p.asked): p for p in c.points}
    dense = at.get((DENSE, 0.0))
    head = ["", *(percent(a) for a in c.asked)]
    value = [[m, *(written(at[m, a].value, c.metric) if (m, a) in at else "" for a in c.asked)] for m in c.methods]
    minus = [
        [m, *(written_difference(at[m, a].minus_dense, c.metric) if (m, a) in at else "" for a in c.asked)]
        for m in c.methods
    ]
    title = c.metric.name if dense is None else f"{c.metric.name} (dense {written(dense.value, c.metric)})"
    unit = ", in points" if c.metric.unit else ""
    return [
        {"title": title, "head": head, "rows": value, "best": []},
        {"title": f"{c.metric.name} minus dense, seed by seed{unit}", "head": head, "rows": minus, "best": []},
    ]


def _costs(c: Comparison) -> dict[str, Any] | None:
    """A row a method: what a network of it takes, mean over sparsities and seeds; ``None`` where nothing was measured."""
    if not c.jobs:
        return None
    rows = []
    for m in [DENSE, *c.methods]:
        known = [p for p in c.points if p.method == m and p.training is not None]
        if known:
            seconds = (_mean(known, "dense"), _mean(known, "pruning"), _mean(known, "training"))
            peak = max((p.peak for p in known if p.peak is not None), default=None)
            rows.append([m, *(words.seconds(s) for s in seconds), f"{_mean(known, 'epochs'):g}", words.memory(peak)])
    head = ["", "dense network before", "pruning in one shot", "own training", "epochs in all", "peak memory"]
    return {"title": "", "head": head, "rows": rows, "best": []}


def _mean(points: Sequence[Point], what: str) -> float:
    return interval([getattr(p, what) or 0.0 for p in points]).mean


def _every(c: Comparison) -> dict[str, Any]:
    """A row a point."""
    rows = [
        [
            p.method, percent(p.asked) if p.asked else "", str(len(p.seeds)), written(p.value, c.metric),
            words.factor(p.compression), words.factor(p.speedup), f"{p.epochs:g}", words.seconds(p.pruning),
            words.seconds(p.training), words.memory(p.peak),
        ]
        for p in c.points
    ]  # fmt: skip
    head = [
        "",
        "sparsity",
        "seeds",
        c.metric.name,
        "fewer parameters",
        "fewer FLOPs",
        "epochs",
        "pruning",
        "training",
        "memory",
    ]
    return {"title": "", "head": head, "rows": rows, "best": []}
