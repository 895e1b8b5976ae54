"""Charts: labels and styles that can be told apart, and lines that stay on their axes."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from secateur.report import svg


def test_labels_at_the_ends_of_lines_never_overlap() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        heights = generator.uniform(0, 250, size=6).tolist()
        placed = sorted(svg.spread(heights, 10, 260))
        assert 10 <= placed[0] and placed[-1] <= 260
        assert all(b - a >= svg.LINE_GAP - 1e-9 for a, b in pairwise(placed))


def test_every_style_has_a_shape_of_its_own() -> None:
    shapes = {re.sub(r"\bs\d\b", "", svg.mark(style, 10.0, 10.0)) for style in range(svg.STYLES)}
    assert len(shapes) == svg.STYLES
    assert svg.mark(svg.STYLES, 10.0, 10.0) == svg.mark(0, 10.0, 10.0)


def chart(*values: float, label: str = "a") -> str:
    """A line through ``values`` at 0, 1, 2, ... on an axis from 0 to 10."""
    marks = [svg.Mark(x, y, y, y, "") for x, y in enumerate(values)]
    x = svg.Axis("", 0, len(values) - 1, [])
    return svg.line_chart("a chart", x, svg.Axis("", 0.0, 10.0, []), [svg.Series(label, 0, marks)])


def lines(drawn: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline [^>]*points="([^"]*)"', drawn)
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.split())] for line in found]


def test_a_line_is_cut_where_it_leaves_the_axis() -> None:
    wide, tall = svg.WIDTH - svg.RIGHT - svg.LEFT, svg.HEIGHT - svg.BOTTOM - svg.TOP
    inside = chart(5.0, 5.0, 10.0)
    assert [len(line) for line in lines(inside)] == [3] and inside.count("<circle") == 3
    # From 5 down to -5 half the way is on the axis; from -5 up to 10 the last two thirds are.
    out, back = lines(chart(5.0, -5.0, 10.0))
    assert out == [(svg.LEFT, svg.TOP + tall / 2), pytest.approx((svg.LEFT + wide / 4, svg.TOP + tall), abs=0.1)]
    assert back[0] == pytest.approx((svg.LEFT + wide * (1 / 2 + 1 / 6), svg.TOP + tall), abs=0.1)
    assert chart(5.0, -5.0, 10.0).count("<circle") == 2
    assert lines(chart(-1.0, 11.0)) == []


def test_a_shade_is_the_errors_seen_through_the_axis() -> None:
    marks = [svg.Mark(0, 5.0, 4.0, 6.0, ""), svg.Mark(1, -5.0, -15.0, 5.0, "")]
    drawn = svg.line_chart(
        "a chart", svg.Axis("", 0, 1, []), svg.Axis("", 0.0, 10.0, []), [svg.Series("a", 0, marks, "shaded")]
    )
    left, right, top, bottom = svg.LEFT, svg.WIDTH - svg.RIGHT, svg.TOP, svg.HEIGHT - svg.BOTTOM
    assert f'viewBox="{left} {top} {right - left} {bottom - top}"' in drawn
    (points,) = re.findall(r'<polygon [^>]*points="([^"]*)"', drawn)
    heights = [float(p.split(",")[1]) for p in points.split()]
    unit = (bottom - top) / 10
    assert heights == pytest.approx([top + 4 * unit, top + 5 * unit, bottom + 15 * unit, top + 6 * unit], abs=0.1)


def test_labels_of_ticks_do_not_overlap() -> None:
    axis = svg.sparsity_axis([0.8, 0.9, 0.97, 0.972, 0.974, 0.976])
    drawn = svg.line_chart("a chart", axis, svg.Axis("", 0.0, 1.0, []), [])
    shown = [(float(x), t) for x, t in re.findall(r'<text class="middle" x="([^"]*)"[^>]*>([^<]*)<', drawn)]
    assert {"80", "90", "97.6"} <= {t for _, t in shown} and len(shown) < 6
    for (b, later), (a, earlier) in pairwise(shown):
        assert b - a >= svg.LETTER * (len(earlier) + len(later)) / 2


def test_long_labels_make_room_and_are_cut() -> None:
    def width(label: str) -> float:
        return float(re.findall(r'viewBox="0 0 (\d+)', chart(1.0, 2.0, label=label))[0])

    assert width("a") == svg.WIDTH < width("a" * svg.LONGEST) == width("a" * 100)
    assert f"<title>{'b' * 100}</title>" in chart(1.0, label="b" * 100)


def test_axes_span_what_they_are_given() -> None:
    for low, high in ((0.3, 0.7), (-5.0, 1e-3), (99.9, 100.0), (2.0, 2.0), (0.0, 0.0)):
        axis = svg.nice_axis("", low, high, str)
        assert axis.low <= low <= high <= axis.high and axis.low < axis.high and 2 <= len(axis.ticks) <= 9
    for low, high in ((0.06, 2.3), (1e-7, 3.0), (0.5, 100.0)):
        axis = svg.log_axis("", low, high)
        assert axis.low <= low <= high <= axis.high and 2 <= len(axis.ticks) <= 9
        assert all(axis.low <= v <= axis.high for v, _ in axis.ticks)
    assert svg.Axis("", 0.9, 0.9, []).at(0.9, 0.0, 100.0) == 50.0
