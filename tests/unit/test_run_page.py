"""The page of a run: its numbers are the data's, its sentences are honest, and it loads nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from secateur import report
from secateur.report.run_charts import MOST_POINTS, loss_chart, schedule_chart, thin, trainings
from secateur.report.run_facts import Cell, Log, RunFacts, metrics
from secateur.report.run_page import render
from secateur.report.words import MINUS

DENSE = (90.0, 91.0, 92.0)
Scores = Mapping[tuple[str, float], Sequence[float]]

CLEAR: Scores = {("GMP", 0.8): (89.0, 90.1, 90.9), ("IMP", 0.8): (85.0, 86.0, 87.2)}
UNCLEAR: Scores = {("GMP", 0.8): (89.0, 88.0, 91.0), ("IMP", 0.8): (88.0, 89.5, 90.0)}


def cells(scores: Scores, dense: Sequence[float] = DENSE, metric: str = "accuracy") -> list[Cell]:
    """The dense cells, and those of ``(method, asked) -> a value a seed``."""
    found = [Cell(seed, "dense", 0.0, 0.0, {metric: v}, 5) for seed, v in enumerate(dense)]
    for (method, asked), values in scores.items():
        found += [Cell(seed, method, asked, asked, {metric: v}, 5) for seed, v in enumerate(values)]
    return found


def facts(found: Sequence[Cell], logs: Sequence[Log] = (), **more: object) -> RunFacts:
    return RunFacts(**{"name": "A run", "about": "", "recipe": "", "cells": found, "logs": logs, "percent": ["accuracy"], **more})  # type: ignore[arg-type]  # fmt: skip


def log(method: str, what: str, steps: int, seed: int = 0, target: float = 0.0) -> Log:
    at = list(range(1, steps + 1))
    asked = [target * min(1.0, 2 * t / steps) for t in at]
    return Log(seed, method, what, at, [2.0 / t for t in at], asked, asked)


class Page(HTMLParser):
    """What a browser would see: text, elements with their attributes, and whether they nest."""

    VOID = frozenset({"meta", "line", "rect", "circle", "path", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th", "span") and self.rows:
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, *begins: str) -> list[str]:
        (found,) = (r for r in self.rows if r[: len(begins)] == list(begins))
        return found


def page(run: RunFacts) -> Page:
    found = Page(render(run))
    assert not found.open
    return found


def test_the_numbers_are_the_means_and_paired_differences_of_the_data() -> None:
    found = page(facts(cells({**CLEAR, ("GMP", 0.9): (80.0, 81.0, 82.0)})))
    # GMP at 80 %: mean 90, standard deviation sqrt((1 + .01 + .81) / 2); t(0.975, 2) = 4.30265.
    half = 4.30265 * math.sqrt(1.82 / 2) / math.sqrt(3)
    assert ["GMP", f"90.00 ± {half:.2f}%", "81.00 ± 2.48%"] in found.rows
    assert ["IMP", "86.07 ± 2.74%", ""] in found.rows  # IMP lacks a sparsity
    # Minus dense: -1, -0.9, -1.1.
    assert ["GMP", f"{MINUS}1.00 ± 0.25", f"{MINUS}10.00 ± 0.00"] in found.rows
    assert found.row("GMP", "1", "80%") == ["GMP", "1", "80%", "80.0000%", "5", "90.10%"]
    assert "accuracy (dense 91.00 ± 2.48%)" in found.text


def test_what_is_told_apart_is_called_best() -> None:
    said = page(facts(cells(CLEAR))).text
    assert "Best accuracy: GMP at 80%." in said
    assert (
        "80% GMP is best: accuracy 90.00 ± 2.37%, 1.00 ± 0.25 points below dense, 3.93 ± 0.52 points above the next (IMP)."
        in said
    )


def test_what_is_not_told_apart_is_not() -> None:
    said = page(facts(cells(UNCLEAR))).text
    assert (
        "The best method is not told apart from the next at any sparsity. The best mean accuracy: GMP at 80%." in said
    )
    assert "GMP has the best mean: accuracy 89.33 ± 3.79%" in said
    assert "not told apart from the next (IMP: +0.17 ± 3.59 points)" in said
    assert "GMP is best" not in said


def test_both_kinds_are_kept_apart() -> None:
    at_90 = {(m, 0.9): v for (m, _), v in UNCLEAR.items()}
    said = page(facts(cells({**CLEAR, **at_90}))).text
    assert "Best accuracy: GMP at 80%. At 90% the best two are not told apart." in said


def test_one_seed_tells_nothing_apart() -> None:
    said = page(facts(cells({k: v[:1] for k, v in CLEAR.items()}, DENSE[:1]))).text
    assert "One seed tells no difference apart. The best accuracy in it: GMP at 80%." in said
    assert (
        "GMP has the best value: accuracy 89.00%, 1.00 points below dense, 4.00 points above the next (IMP); one seed "
        "tells no difference apart." in said
    )
    assert "±" not in said


def test_a_single_method_is_held_against_dense() -> None:
    assert (
        "GMP is told apart from dense at 80%. No other method was tried."
        in page(facts(cells({k: v for k, v in CLEAR.items() if k[0] == "GMP"}))).text
    )
    noisy = {("GMP", 0.8): (89.0, 92.0, 91.0)}
    assert "GMP is not told apart from dense at any sparsity." in page(facts(cells(noisy))).text


def test_pairs_are_of_the_same_seed() -> None:
    short = {("GMP", 0.8): CLEAR["GMP", 0.8], ("IMP", 0.8): (85.0,)}
    (metric,) = metrics(facts(cells(short)))
    minus = metric.minus(("GMP", 0.8), ("IMP", 0.8))
    assert minus is not None and (minus.mean, minus.n) == (4.0, 1)
    assert "one seed tells no difference apart" in page(facts(cells(short))).text


def test_less_can_be_better() -> None:
    scores: Scores = {("GMP", 0.8): (0.20, 0.21, 0.22), ("IMP", 0.8): (0.50, 0.51, 0.53)}
    run = facts(cells(scores, (0.1, 0.11, 0.12), "loss"), lower_is_better=["loss"])
    said = page(run).text
    assert "GMP is best: loss 0.2100 ± 0.0248, 0.1000 ± 0.0000 above dense" in said
    assert "Less is better." in said


def test_training_that_differs_is_said() -> None:
    found = [Cell(c.seed, c.method, c.asked, c.asked, c.metrics, 40 if c.method == "GMP" else 5) for c in cells(CLEAR)]
    assert "; GMP was trained for 40 epochs, IMP for 5." in page(facts(found)).text


def test_more_metrics_go_into_tables() -> None:
    found = [Cell(c.seed, c.method, c.asked, c.sparsity, {**c.metrics, "f1": 0.5}, 5) for c in cells(CLEAR)]
    shown = page(facts(found))
    assert "f1 (dense 0.5000 ± 0.0000)" in shown.text
    assert ["GMP", "0.5000 ± 0.0000"] in shown.rows


NASTY = '<script>alert("1")</script>&\'\x1b[31m\u202e'


def test_names_are_text() -> None:
    named = [
        Cell(0, NASTY, 0.8, 0.8, {NASTY: 3.0}, 1, {NASTY: 0.8, "b": 0.7}),
        Cell(0, "dense", 0.0, 0.0, {NASTY: 4.0}, 1),
    ]
    logs = [log(NASTY, NASTY, 3, target=0.5), log(NASTY, "round 1", 3, target=0.6)]
    text = render(RunFacts(NASTY, NASTY, f"{NASTY}\n b: 1", named, logs, {NASTY: NASTY}, [NASTY]))
    found = Page(text)
    assert not found.open
    assert "script" not in {tag for tag, _ in found.elements}
    assert not any(a.startswith("on") for _, attrs in found.elements for a in attrs)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert '<script>alert("1")</script>&\'\\x1b[31m\\u202e' in found.text


def test_it_loads_nothing() -> None:
    logs = [log("dense", "0", 50), log("GMP", "0.8", 50, target=0.8)]
    text = render(facts(cells(CLEAR), logs, recipe="model: nets:lenet", notes=["A note."], facts={"Machine": "one"}))
    loads = r"https?:|//[a-z]|\b(src|href|srcset|action|data)\s*=|url\(|@import|<script|<link|<iframe"
    assert re.findall(loads, text, re.IGNORECASE) == []
    assert text.count("<svg") == text.count("</svg>") == 5  # two of the metric, two of the loss, one schedule
    for said in ("model: nets:lenet", "A note.", "Machine"):
        assert said in text


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline [^>]*points="([^"]*)"', svg)
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.split())] for line in found]


def test_long_logs_are_thinned() -> None:
    n = 300_000
    steps, values = np.arange(1.0, n + 1), np.sin(np.arange(n) / 1000)
    at, mean = thin(steps, values)
    assert len(at) <= MOST_POINTS and len(at) > MOST_POINTS / 2
    assert at == sorted(at)
    width = math.ceil(n / MOST_POINTS)
    assert mean[3] == pytest.approx(values[3 * width : 4 * width].mean())
    flat = Log(0, "GMP", "0.9", range(1, n + 1), values + 2.0, values, values)
    svg = loss_chart("GMP", [flat])
    assert svg is not None
    (line,) = points_of(svg)
    assert MOST_POINTS / 2 < len(line) <= MOST_POINTS


def test_thinning_leaves_out_what_is_not_finite() -> None:
    assert thin(np.array([1.0, 2.0, 3.0]), np.array([math.nan, 5.0, math.inf])) == ([2.0], [5.0])
    assert thin(np.array([1.0]), np.array([math.nan])) == ([], [])


def test_rounds_follow_each_other_and_sparsities_do_not() -> None:
    rounds = [log("IMP", f"round {r}", 10, seed) for seed in (0, 1) for r in range(3)]
    assert [begin for begin, _ in trainings("IMP", rounds)["all rounds"]] == [0, 10, 20] * 2
    gradual = [log("GMP", what, 10, target=0.5) for what in ("0.8", "0.9")]
    assert {label: [b for b, _ in parts] for label, parts in trainings("GMP", gradual).items()} == {
        "80%": [0],
        "90%": [0],
    }


def test_a_schedule_is_drawn_where_it_changes_and_seen_where_it_was_missed() -> None:
    assert schedule_chart("dense", [log("dense", "0", 10)]) is None
    off = Log(0, "GMP", "0.8", [1, 2], [1.0, 1.0], [0.4, 0.8], [0.4, 0.75])
    svg = schedule_chart("GMP", [off])
    assert svg is not None and svg.count("<polyline") == 2
    row = page(facts(cells(CLEAR), [off])).row("GMP", "80%")
    assert row == ["GMP", "80%", "2", "80.000%", "75.000%", "5.000"]


def test_layers_are_shown_at_the_highest_sparsity_and_long_lists_fold() -> None:
    names = [f"layer{i}.weight" for i in range(200)]
    found = [
        Cell(s, "GMP", a, a, {"accuracy": 90.0}, 5, {n: a - 0.1 + 0.0005 * i + 0.01 * s for i, n in enumerate(names)})
        for s in (0, 2)
        for a in (0.8, 0.9)
    ]
    text = render(facts(found))
    shown = Page(text)
    assert "Layers at 90%" in shown.text
    assert ["2 layer1.weight", "81.05%"] in shown.rows  # 0.8 + 0.0005, and the mean of 0 and 0.02 on top
    assert "<summary>All 200 layers</summary>" in text
    few = [Cell(c.seed, c.method, c.asked, c.sparsity, c.metrics, 5, dict(list(c.layers.items())[:3])) for c in found]
    assert "layers</summary>" not in render(facts(few))


def test_what_is_not_finite_is_left_out_and_said() -> None:
    found = cells({**CLEAR, ("GMP", 0.9): (math.nan, 80.0, 82.0)})
    bad = Log(0, "GMP", "0.9", [1, 2, 3], [1.0, math.nan, math.inf], [0.0] * 3, [0.0] * 3)
    text = render(facts(found, [bad]))
    assert "3 numbers are not finite" in text
    assert ["GMP", "90.00 ± 2.37%", "81.00 ± 12.71%"] in Page(text).rows
    assert not re.search(r"\b(nan|inf)\b", Page(text).text, re.IGNORECASE)


@pytest.mark.parametrize(
    "found",
    [[], cells({}), cells({("GMP", 0.8): (math.nan,) * 3}), cells({("GMP", 0.8): (1.0,) * 3}, ())],
    ids=["no cells", "dense alone", "nothing finite", "no dense"],
)
def test_little_is_a_page_too(found: list[Cell]) -> None:
    said = page(facts(found)).text
    assert ("No pruned network was measured." in said) == (not found or found[0].method == "dense")


def test_the_folder_of_the_package_holds_what_the_page_is_made_of() -> None:
    # The wheel takes the package's folder as it is, so what stands beside the module is what is installed.
    folder = Path(report.__file__).parent
    for name in ("run_page.html.j2", "compare_page.html.j2", "macros.html.j2", "page.css"):
        assert (folder / name).is_file()
