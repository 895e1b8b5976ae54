"""The page of a comparison: its numbers are the comparison's, it says what is not known, and it loads nothing."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from secateur.evaluate.compare import Comparison, compare
from secateur.report.compare_page import render
from secateur.report.run_facts import Cost
from secateur.report.words import MINUS
from tests.unit.test_compare import SPENT, cells, changed, new
from tests.unit.test_run_page import NASTY, Page, points_of


def page(c: Comparison, **more: str) -> Page:
    found = Page(render(c, "A comparison", more.get("about", ""), {"machine": "one"}, recipe=more.get("recipe", "")))
    assert not found.open
    return found


def costs(jobs: int = 1) -> list[Cost]:
    return [Cost(c.seed, c.method, c.asked, 3.0 * bool(c.asked), 0.25, 20.0, 734_000_000, jobs) for c in cells()]


def test_the_verdicts_and_their_numbers() -> None:
    found = page(
        compare(cells({"new": [-1.0 + e for e in SPENT], "old": [0.4 + e for e in SPENT]}), percent=["accuracy"])
    )
    ahead, behind = (next(r for r in found.rows if r[:1] == [m]) for m in ("new", "old"))
    assert ahead[1].startswith("▲ +1.00 ± 0.20") and behind[1].startswith(f"▼ {MINUS}0.40 ± 0.20")
    assert (
        "Where is magnitude beaten, and by how much? magnitude is beaten by new at 50%, 80%, 90%, 95% and 98%."
        in found.text
    )
    assert "90% new beats magnitude by 1.00 ± 0.20 points; old loses to magnitude by 0.40 ± 0.20 points" in found.text
    assert ["new", "90%", "5", "84.00 ± 1.96%", "10×", "10×", "8", "", "", ""] in found.rows
    assert "The rules: all kept" in found.text and "By parameters that are left: dense; new at 50%, 80%" in found.text


def test_without_enough_seeds_it_says_so_and_shows_the_numbers() -> None:
    said = page(compare(cells(seeds=3), percent=["accuracy"])).text
    assert "No verdict: 3 seeds in common, and a verdict needs 5." in said
    assert "? +1.00 ± 0.25" in said and "▲" not in said and "comparisons were made" not in said


def test_broken_rules_come_first() -> None:
    found = page(compare(changed(new, epochs=20)(cells())))
    assert "The rules: 1 of 10 broken" in found.text
    rules = [row for row in found.rows if row and row[0] in ("✓ kept", "✗ broken")]
    assert len(rules) == 10 and rules[0][:2] == ["✗ broken", "same training budget"]


def test_costs_and_who_was_at_work_beside() -> None:
    alone = page(compare(cells(), costs=costs()))
    assert alone.row("new", "3.0 s") == ["new", "3.0 s", "0.25 s", "20 s", "8", "734 MB"]
    assert "at work beside each other" not in alone.text
    assert "2 processes were at work beside each other" in page(compare(cells(), costs=costs(2))).text
    assert "Time and memory" not in page(compare(cells())).text


def test_the_charts_hold_the_numbers() -> None:
    c = compare(cells(), percent=["accuracy"])
    text = render(c, "", "", {})
    close_up, sparsity, parameters, flops = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert "<title>new, 90% pruned: +1.00 ± 0.20 points: better</title>" in close_up
    assert "<title>new, 90% pruned: accuracy 84.00 ± 1.96%</title>" in sparsity and sparsity.count("<polygon") == 4
    assert "<title>new, 90% pruned: 10× less, accuracy 84.00 ± 1.96%</title>" in parameters
    front = points_of(parameters)[0]
    assert len(front) == 6 and front == sorted(front), "dense, and the new one at each sparsity"
    unknown = changed(lambda c: True, effective_flops=None)(cells())
    assert render(compare(unknown), "", "", {}).count("<figure>") == 3 and flops


def test_names_are_text_and_it_loads_nothing() -> None:
    found = changed(new, method=NASTY)(cells())
    found = [replace(x, metrics={NASTY: x.metrics["accuracy"]}) for x in found]
    text = render(compare(found), NASTY, NASTY, {NASTY: NASTY}, [NASTY], f"{NASTY}\n b: 1")
    shown = Page(text)
    assert not shown.open and "script" not in {tag for tag, _ in shown.elements}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    plain = compare(cells(), costs=costs()).to_html("A", "b", {"c": "d"})
    loads = r"https?:|//[a-z]|\b(src|href|srcset|action|data)\s*=|url\(|@import|<script|<link|<iframe"
    assert re.findall(loads, plain, re.IGNORECASE) == []


@pytest.mark.parametrize("seeds", [1, 5])
def test_little_is_a_page_too(seeds: int) -> None:
    bad = changed(lambda c: c.method != "magnitude", metrics={"accuracy": math.nan})(cells(asked=(0.9,), seeds=seeds))
    said = page(compare(bad)).text
    assert "no verdict for new (no seed in common)" in said and not re.search(r"\b(nan|inf)\b", said, re.IGNORECASE)
