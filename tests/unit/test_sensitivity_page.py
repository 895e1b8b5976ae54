"""The page of a scan: its numbers are the data's, names are escaped, it loads nothing, and labels do not run into each other."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from secateur.evaluate.sensitivity_facts import Layer, Piece, Point, Sensitivity
from secateur.report.sensitivity_page import curves, heat_map, picked, render
from secateur.report.svg import STYLES
from secateur.report.words import MINUS
from tests.unit.test_run_page import Page

ASKED = (0.5, 0.9)
EVIL = '<script>alert("x")</script>&\x1b[31m'


def layer(name: str, *values: float, numel: int = 1000) -> Layer:
    points = tuple(Point(s, round(s * numel), {"accuracy": v, EVIL: 1.0}) for s, v in zip(ASKED, values, strict=True))
    return Layer(name, (Piece(name, (), (numel,), "float32", "linear", numel, 0, 4),), points)


def scan_of(*layers: Layer, **more: object) -> Sensitivity:
    scan = Sensitivity("accuracy", True, {"accuracy": 90.0}, "magnitude", "unstructured", ASKED, layers)
    return replace(scan, **more)  # type: ignore[arg-type]


def page(scan: Sensitivity) -> Page:
    found = Page(render(scan))
    assert not found.open
    return found


def test_numbers_are_those_of_the_scan() -> None:
    found = page(scan_of(layer("a", 89.0, 60.0), layer("b", 90.5, 85.0)))
    assert "First layer a: accuracy falls by 30.00 at 90%, 1.7 times the median layer's 17.50." in found.text
    assert ["1 a", "1,000", "0", "89.00", "60.00", ""] in found.rows
    scan = scan_of(layer("a", 89.0, 60.0), layer("b", 90.5, 85.0))
    drawn = heat_map(scan, scan.layers)
    assert re.findall(r'cell" x="[^>]*>([^<]*)<', drawn) == ["1.00", "30.00", f"{MINUS}0.50", "5.00"]  # what is lost
    shades = [float(s) for s in re.findall(r"calc\(([\d.]+) ", drawn)]
    assert shades == pytest.approx([math.sqrt(1 / 30), 1.0, 0.0, math.sqrt(5 / 30)], abs=1e-3)


def test_what_was_not_measured_and_what_is_not_finite_show() -> None:
    wholly = Layer("z", layer("z", 0, 0).pieces, tuple(Point(s, 1000, why="wholly zero before") for s in ASKED))
    scan = scan_of(layer("a", 80.0, math.nan), wholly)
    found = page(scan)
    drawn = heat_map(scan, scan.layers)
    assert drawn.count('class="track"') == 2 and drawn.count("–</text>") == 2 and "not finite" in drawn
    assert "<title>z: not measured: wholly zero before</title>" in drawn
    assert "1 layer was not measured; that says nothing of how robust it is." in found.text
    assert "1 value is not finite, and counted as the worst." in found.text
    nothing = scan_of(layer("a", math.nan, math.nan))
    assert curves(nothing) is None and "<h2>Curves" not in render(nothing)


def test_everything_is_escaped_and_nothing_is_loaded() -> None:
    scan = scan_of(
        layer(EVIL, 80.0, 70.0), layer("b", 80.0, 1.0), metric=EVIL, dense={EVIL: 2.0}, criterion=EVIL,
        facts={"name": EVIL, EVIL: EVIL},
    )  # fmt: skip
    text = render(scan)
    found = Page(text)
    assert not found.open and "script" not in {tag for tag, _ in found.elements} and "\x1b" not in text
    assert not re.search(r"https?:|url\(|@import|src=|<link", text)
    assert r"&\x1b[31m" in found.text
    assert "\x1b" not in str(scan) and "\x1b" not in "".join(scan.answers())


def test_of_many_layers_some_are_drawn() -> None:
    many = [layer(f"encoder.layer.{i}.attention.self.query.weight", 89.0 - i % 7, 80.0 - i) for i in range(60)]
    scan = scan_of(*many)
    lines = picked(scan)
    assert len(lines) == STYLES - 1 and lines[0] is many[0] and lines[-1] is many[-1]
    assert {many[i].name for i in (58, 57, 1)} <= {x.name for x in lines}
    drawn = curves(scan)
    assert drawn is not None and drawn.count("<polyline") == STYLES and "median layer" in drawn
    assert "…" in drawn and ">60 …" in drawn
    assert render(scan).count('class="heat"') == 120


@pytest.mark.parametrize("name", ["a", "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight" * 3])
def test_names_and_numbers_stand_apart(name: str) -> None:
    drawn = heat_map(scan := scan_of(layer(name, 89.0, 80.0, numel=123_456_789)), scan.layers)
    size = re.search(r'style="width:(\d+)px" viewBox="0 0 (\d+) (\d+)"', drawn)
    assert size and size[1] == size[2]
    shown = re.findall(r'<text class="title" x="([\d.]+)"[^>]*>([^<]*)</text>', drawn)
    count = re.findall(r'<text class="end" x="([\d.]+)"[^>]*>123,456,789</text>', drawn)
    ends = float(shown[0][0]) + 7 * len(shown[0][1])
    assert ends < float(count[0]) - 7 * len("123,456,789") + 10
    assert max(float(x) for x in re.findall(r'<rect [^>]*x="([\d.]+)"', drawn)) + 66 <= float(size[1])


def test_huge_numbers_stay_short() -> None:
    points = tuple(Point(s, 5, {"perplexity": v}) for s, v in zip(ASKED, (9e7, 3e9), strict=True))
    other = replace(layer("b", 0, 0), points=(Point(0.9, 5, {"perplexity": 1e6}),))
    scan = scan_of(
        replace(layer("a", 0, 0), points=points), other, metric="perplexity", higher_is_better=False, dense={"perplexity": 20.0}
    )  # fmt: skip
    assert "3.00e+09" in heat_map(scan, scan.layers)
    assert (
        scan.answers()[0]
        == "First layer a: perplexity rises by 3.00e+09 at 90%, 2.0 times the median layer's 1.50e+09."
    )
