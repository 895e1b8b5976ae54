"""The few statistics that reports and studies need: means with Student intervals, two correlations, a bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean of ``n`` numbers and the half width of its 95 % interval (``None`` for a single number)."""

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero; never so for a single number."""
        return self.half is not None and abs(self.mean) > self.half


def student_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with ``df`` degrees of freedom, by the finite series for whole ``df``.

    With θ = atan(t / √df), the probability of [-t, t] is sin θ · (1 + ½ cos²θ + ½·¾ cos⁴θ + …) for even df
    and 2/π · (θ + sin θ · (cos θ + ⅔ cos³θ + …)) for odd df, up to the power df - 2 (Abramowitz and Stegun,
    26.7.3 and 26.7.4).

    >>> round(student_cdf(1.0, 1), 6)
    0.75
    """
    if df < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {df}")
    theta = math.atan(t / math.sqrt(df))
    odd = df % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for power in range(odd, df - 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (power + 1) / (power + 2)
    central = math.sin(theta) * total
    if odd:
        central = 2 / math.pi * (theta + central)
    return (1 + central) / 2


def student_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = ``p``, for 0.5 <= p < 1, by bisection of `student_cdf`.

    >>> round(student_quantile(0.975, 2), 4)
    4.3027
    """
    if not 0.5 <= p < 1:
        raise ValueError(f"p must be in [0.5, 1), got {p}")
    low, high = 0.0, 1.0
    while student_cdf(high, df) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, df) < p else (low, middle)
    return high


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval, mean ± t(0.975, n - 1) · s / √n with s the sample standard deviation.

    >>> interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one number")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, n)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Interval(mean, student_quantile(0.975, n - 1) * math.sqrt(variance / n), n)


def p_value(values: Sequence[float]) -> float:
    """The two-sided p of Student's test that the mean is zero; below 0.05 just where the 95 % interval leaves zero out.

    Numbers that are all the same have p = 0, or 1 where they are zero.

    >>> round(p_value([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"a test needs at least two numbers, got {n}")
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    if variance == 0:
        return 0.0 if mean else 1.0
    return 2 * (1 - student_cdf(abs(mean) / math.sqrt(variance / n), n - 1))


def holm(ps: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several tests still reject when all of them together may err with probability ``level`` (Holm, 1979).

    From the smallest p up, the i-th of m rejects while p <= level / (m - i), with i from 0; the first that does not ends it.

    >>> holm([0.04, 0.01, 0.03, 0.005])
    [False, True, False, True]
    """
    kept = [False] * len(ps)
    for i, at in enumerate(sorted(range(len(ps)), key=lambda j: ps[j])):
        if ps[at] > level / (len(ps) - i):
            break
        kept[at] = True
    return kept


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties given the mean of the ranks they span; ``(n,)`` to ``(n,)`` float64.

    >>> ranks(np.array([10.0, 30.0, 10.0, 20.0])).tolist()
    [1.5, 4.0, 1.5, 3.0]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two ``(n,)`` arrays; NaN where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation: Pearson's of the ranks, ties averaged.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([5.0, 6.0, 4.0])), 3)
    -0.5
    """
    return pearson(ranks(x), ranks(y))


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, resamples: int, seed: int = 0) -> np.ndarray:
    """``statistic`` of ``resamples`` draws of ``n`` indices with replacement, ``(resamples,)`` float64.

    The draws depend on ``n`` and ``seed`` alone, so two statistics of the same items are paired draw by draw.
    """
    generator = np.random.default_rng(seed)
    return np.array([statistic(generator.integers(0, n, n)) for _ in range(resamples)])


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap draws."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)
