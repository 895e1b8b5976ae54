"""Results as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from examples.first_cut import charts
from examples.first_cut.answer import MARGIN, Early, follows, headline, sentence
from examples.first_cut.job import Results
from examples.first_cut.settings import METHODS, REFERENCE
from examples.first_cut.summary import Network, Point
from examples.first_cut.words import NAMES, TESTS, percent, points, span
from secateur import report
from secateur.evaluate.statistics import student_quantile
from secateur.report.words import share, signed


def figure(svg: str, caption: str) -> dict[str, Any]:
    """A chart and the words above it."""
    return {"svg": Markup(svg), "caption": caption}


def figures(network: Network) -> list[dict[str, Any]]:
    """The charts of one network."""
    if not network.batchnorm:
        accuracy = charts.accuracy_chart(network, lambda p: p.before, network.dense, "after pruning")
        return [
            figure(accuracy, "Test accuracy, nothing retrained"),
            figure(charts.difference_chart(network), "Accuracy minus global, in points"),
        ]
    before = charts.accuracy_chart(network, lambda p: p.before, network.dense, "before recalibration")
    dense = network.dense_after or network.dense
    after = charts.accuracy_chart(network, lambda p: p.after, dense, "after recalibration")
    return [
        figure(before, "Test accuracy right after pruning"),
        figure(after, "Test accuracy after BatchNorm recalibration"),
        figure(charts.difference_chart(network), "After recalibration: accuracy minus global, in points"),
        figure(charts.flops_chart(network), "After recalibration: accuracy against FLOPs"),
    ]


def tables(network: Network) -> list[dict[str, Any]]:
    """All numbers of one network: a table a quantity."""
    others = [m for m in METHODS if m != REFERENCE]
    out = [_table(network, "Test accuracy right after pruning", METHODS, lambda p: percent(p.before))]
    if network.batchnorm:
        title = "Test accuracy after BatchNorm recalibration"
        out.append(_table(network, title, METHODS, lambda p: percent(p.final)))
    title = "Accuracy minus global on the same weights, in points"
    out.append(_table(network, title, others, lambda p: points(p.minus_global)))
    out.append(_table(network, "FLOPs left, of the dense network's", METHODS, lambda p: percent(p.flops)))
    return out


def _table(network: Network, title: str, methods: Sequence[str], show: Callable[[Point], str]) -> dict[str, Any]:
    """A row a sparsity, a column a method."""
    rows = [
        [share(row[0].sparsity, 0), *(show(p) for p in row)]
        for row in zip(*(network.points[m] for m in methods), strict=True)
    ]
    return {"title": title, "head": ["pruned", *(NAMES[m] for m in methods)], "rows": rows}


def encoder_table(encoder: dict[str, Any]) -> dict[str, Any]:
    """All numbers of the encoder."""
    rows = [[share(0.0, 0), "dense", *(span(encoder["dense"][t]) for t in TESTS), share(1.0), share(0.0)]]
    for r in encoder["runs"]:
        scores = [span(r["scores"][t]) for t in TESTS]
        flops, model = share(r["flops"] / r["flops_dense"]), share(r["model_sparsity"])
        rows.append([share(r["asked"], 0), NAMES[r["method"]], *scores, flops, model])
    head = ["pruned", "allocation", *TESTS.values(), "FLOPs left", "pruned of all parameters"]
    return {"title": "Scores with 95% bootstrap intervals", "head": head, "rows": rows}


def answer_table(answers: list[Early]) -> dict[str, Any]:
    """What stands behind the answer, a column a network."""
    shown: list[tuple[str, Callable[[Early], str]]] = [
        ("pruned in all", lambda a: share(a.sparsity, 0)),
        ("first layer", lambda a: f"{a.first[0]} {share(a.first[1])}"),
        ("last layer", lambda a: f"{a.last[0]} {share(a.last[1])}"),
        ("early half, mean", lambda a: percent(a.early)),
        ("late half, mean", lambda a: percent(a.late)),
        ("late minus early, points", lambda a: points(a.late_minus_early)),
        ("rank correlation with depth", lambda a: signed(a.depth, 2)),
        ("rank correlation with fan-in", lambda a: signed(a.fan_in, 2)),
    ]
    rows = [[label, *(show(a) for a in answers)] for label, show in shown]
    head = ["", *(a.title for a in answers)]
    return {"title": "Share of the layers that global pruned", "head": head, "rows": rows}


def render(results: Results, seconds: dict[str, float]) -> str:
    """The page as one HTML document that loads nothing."""
    folders = [Path(__file__).parent, Path(report.__file__).parent]
    environment = Environment(loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined)
    encoder = results.measured["encoder"]
    last = max(r["asked"] for r in encoder["runs"])
    deepest = next(r for r in encoder["runs"] if r["method"] == "global" and r["asked"] == last)
    seeds = len(results.settings.seeds)
    return environment.get_template("page.html.j2").render(
        results=results,
        settings=results.settings,
        seconds=seconds,
        headline=headline(results.answers),
        sentences=[sentence(a) for a in results.answers],
        follows=follows(results.answers),
        answer_table=answer_table(results.answers),
        margin=round(100 * MARGIN),
        layer_sparsity=share(results.settings.layer_sparsity, 0),
        n=seeds,
        t=student_quantile(0.975, seeds - 1) if seeds > 1 else None,
        networks=[
            {"about": n, "figures": figures(n), "tables": tables(n), "bars": Markup(charts.layer_bars(n))}
            for n in results.networks
        ],
        encoder=encoder,
        encoder_figures=[
            figure(charts.score_chart(encoder, test, title), f"{title}: agreement with people")
            for test, title in TESTS.items()
        ],
        encoder_table=encoder_table(encoder),
        grid=Markup(charts.encoder_grid(deepest["layers"])),
        grid_sparsity=share(last, 0),
    )
