"""Means with intervals, correlations, the bootstrap, by hand and against printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from secateur.evaluate import statistics as stats


def test_ranks_average_ties() -> None:
    assert stats.ranks(np.array([3.0, 1.0, 3.0, 3.0, 0.0])).tolist() == [4.0, 2.0, 4.0, 4.0, 1.0]


def test_spearman_with_ties_by_hand() -> None:
    # Ranks of x: 1, 2.5, 2.5, 4; of y: 1, 3, 2, 4. Less their means: (-1.5, 0, 0, 1.5), (-1.5, .5, -.5, 1.5).
    # Products sum to 4.5, squares to 4.5 and 5: 4.5 / sqrt(22.5).
    found = stats.spearman(np.array([1.0, 2.0, 2.0, 9.0]), np.array([0.0, 5.0, 3.0, 7.0]))
    assert found == pytest.approx(4.5 / math.sqrt(22.5))


def test_pearson_by_hand() -> None:
    assert stats.pearson(np.array([1.0, 2.0, 4.0]), np.array([-2.0, -4.0, -8.0])) == pytest.approx(-1.0)
    assert math.isnan(stats.pearson(np.ones(3), np.arange(3.0)))


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_student_quantiles_are_those_of_the_printed_tables(df: int, t: float) -> None:
    assert stats.student_quantile(0.975, df) == pytest.approx(t, rel=1e-5)


def test_interval_by_hand() -> None:
    # Mean 2, standard deviation 1: the half width is 4.30265 / sqrt(3).
    found = stats.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert stats.interval([0.5]) == stats.Interval(0.5, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        stats.interval([])


def test_an_interval_leaves_out_zero_or_not() -> None:
    assert [stats.Interval(-1.0, half, 3).excludes_zero for half in (0.5, 1.0, 1.5)] == [True, False, False]
    assert not stats.Interval(1.0, None, 1).excludes_zero


def test_p_is_below_one_twentieth_just_where_the_interval_leaves_zero_out() -> None:
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        values = generator.normal(0.8, 1.0, int(generator.integers(2, 9))).tolist()
        shown = stats.interval(values).excludes_zero
        assert (stats.p_value(values) < 0.05) == shown
        seen.add(shown)
    assert seen == {True, False}
    # t = 2 / (1 / sqrt(3)) with two degrees of freedom: p = 1 - t / sqrt(t² + 2).
    t = 2 * math.sqrt(3)
    assert stats.p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert stats.p_value([2.0, 2.0]) == 0.0 and stats.p_value([0.0, 0.0]) == 1.0
    with pytest.raises(ValueError, match="at least two"):
        stats.p_value([1.0])


def test_holm_stops_at_the_first_that_does_not_reject() -> None:
    # Of four: 0.05 / 4, / 3, / 2, / 1 are 0.0125, 0.0167, 0.025, 0.05.
    assert stats.holm([0.04, 0.01, 0.03, 0.005]) == [False, True, False, True]
    assert stats.holm([0.0125, 0.0166, 0.025, 0.05]) == [True] * 4
    assert stats.holm([0.0126, 0.001, 0.0002, 0.0001]) == [True] * 4
    assert stats.holm([0.02, 0.021, 0.022, 0.03]) == [False] * 4, "0.03 alone would be below 0.05"
    assert stats.holm([]) == []


def test_bootstrap_pairs_its_draws() -> None:
    x = np.arange(20.0)
    a = stats.bootstrap(lambda i: float(x[i].mean()), 20, 100)
    b = stats.bootstrap(lambda i: float(x[i].mean() + 1), 20, 100)
    assert np.allclose(b - a, 1.0) and a.std() > 0.5
    low, high = stats.percentile_interval(a)
    assert low < x.mean() < high
