"""The cheapest way to a budget, against every way there is, and against the one place where an optimum can lie."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.evaluate.spend import EVEN, Curve, cheapest

LOSSES = st.sampled_from([0.0, 0.0, 0.25, 1.0, 3.0, 10.0])


@st.composite
def curves(draw: st.DrawFn, most: int = 9) -> Curve:
    """A few weights, with steps up that need not get steeper."""
    zeros = sorted(draw(st.sets(st.integers(0, most), min_size=1, max_size=4)))
    rises = [draw(LOSSES) for _ in zeros[1:]]
    return Curve(tuple(zeros), tuple(np.cumsum([0.0, *rises]).tolist()))


def loss(some: Sequence[Curve], counts: Sequence[int]) -> float:
    return sum(c.at(z) for c, z in zip(some, counts, strict=True))


def slack(some: Sequence[Curve]) -> float:
    """What evenness may cost, and rounding."""
    return 2 * EVEN * (sum(c.loss[-1] for c in some) or 1.0)


@given(st.lists(curves(), min_size=1, max_size=4), st.floats(0, 1))
def test_nothing_is_cheaper_than_what_is_found(some: list[Curve], share: float) -> None:
    low, high = sum(c.low for c in some), sum(c.high for c in some)
    need = round(low + share * (high - low))
    found = cheapest(some, [1.0] * len(some), need)
    assert sum(found) == need
    assert all(c.low <= z <= c.high for c, z in zip(some, found, strict=True))
    ways = itertools.product(*(range(c.low, c.high + 1) for c in some))
    best = min(loss(some, w) for w in ways if sum(w) == need)
    assert loss(some, found) <= best + slack(some)


@given(st.lists(st.tuples(curves(6), st.sampled_from([1.0, 2.0, 3.5])), min_size=1, max_size=4), st.floats(0, 1))
def test_zeros_may_be_worth_more_in_one_layer_than_in_another(some: list[tuple[Curve, float]], share: float) -> None:
    lines, gains = [c for c, _ in some], [g for _, g in some]
    need = share * sum(c.high * g for c, g in some)
    found = cheapest(lines, gains, need)
    got = sum(z * g for z, g in zip(found, gains, strict=True))
    low = sum(c.low * g for c, g in some)
    assert got >= need - 1e-9
    assert got - need < max(gains) or got == low  # no weight more than is needed
    ways = itertools.product(*(range(c.low, c.high + 1) for c in lines))
    best = min(loss(lines, w) for w in ways if sum(z * g for z, g in zip(w, gains, strict=True)) >= need - 1e-9)
    assert loss(lines, found) <= best + slack(lines)


def exact(some: Sequence[Curve], need: int) -> float:
    """The least loss: in an optimum all layers but one are at a measured point, since between two that are not, zeros could
    be moved one way or the other without loss."""
    best = np.inf
    for free, line in enumerate(some):
        zeros, lost = np.zeros(1), np.zeros(1)
        for c in (c for i, c in enumerate(some) if i != free):
            zeros = (zeros[:, None] + np.array(c.zeros)).ravel()
            lost = (lost[:, None] + np.array(c.loss)).ravel()
        left = np.maximum(need - zeros, line.low)
        able = left <= line.high
        if able.any():
            best = min(best, float((lost + np.interp(left, line.zeros, line.loss))[able].min()))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_large_layers_come_close_to_the_exact_optimum(seed: int) -> None:
    draw = random.Random(seed)
    some = []
    for _ in range(5):
        n = draw.randint(5, 20_000)
        zeros = sorted({0, *(round(n * s) for s in (0.5, 0.7, 0.8, 0.9, 0.95))})
        rises = [draw.expovariate(1) ** 2 * draw.choice([0, 1, 1, 3]) for _ in zeros[1:]]
        some.append(Curve(tuple(zeros), tuple(np.cumsum([0.0, *rises]).tolist())))
    need = round(draw.random() * sum(c.high for c in some))
    found = cheapest(some, [1.0] * 5, need)
    assert sum(found) == need
    assert loss(some, found) <= exact(some, need) + 1e-3 * sum(c.loss[-1] for c in some)


def test_of_equal_losses_the_even_one_is_taken() -> None:
    flat = [Curve((0, 95), (0.0, 0.0)), Curve((0, 190), (0.0, 0.0)), Curve((0, 950), (0.0, 0.0))]
    found = cheapest(flat, [1.0] * 3, 520)
    assert found == pytest.approx([40, 80, 400], abs=2)


def test_raising_the_cheapest_slope_is_not_enough() -> None:
    """The first step of one layer is cheap and leads nowhere; the other is dear at first, and then free."""
    some = [Curve((0, 10, 90), (0.0, 1.0, 90.0)), Curve((0, 10, 90), (0.0, 5.0, 5.0))]
    assert cheapest(some, [1.0, 1.0], 90) == [0, 90]


def test_more_zeros_than_are_asked_for_stay() -> None:
    assert cheapest([Curve((5, 9), (0.0, 1.0)), Curve((4,), (0.0,))], [1.0, 1.0], 3) == [5, 4]


def test_a_curve_can_begin_elsewhere() -> None:
    curve = Curve((0, 50, 90), (0.0, 1.0, 5.0))
    assert curve.starting(70) == Curve((70, 90), (3.0, 5.0))
    assert curve.starting(95) == Curve((95,), (5.0,))
    assert Curve((10, 50), (0.0, 1.0)).starting(0) == Curve((0, 10, 50), (0.0, 0.0, 1.0))
