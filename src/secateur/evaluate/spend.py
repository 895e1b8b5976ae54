"""The cheapest way to a budget, where each of several layers has a price list: how much is lost at each count of zeros."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GRID, FINEST, COARSEST = 4096, 1024, 32
"""Steps that the counts of all layers together are looked at in, beside the measured ones, and those of one layer at the most
and at the least; a layer of no more weights than it has steps is looked at one by one."""
STATES = 2048
"""Ways to begin that are gone on with, at most, after each layer; of no more than that, none is ever left out."""
EVEN = 1e-6
"""What evenness weighs, as a share of all that can be lost: of equal losses, the one that spreads the zeros more evenly."""


@dataclass(frozen=True)
class Curve:
    """What a layer is predicted to lose: straight lines between points, never falling, from 0 where it begins.

    Attributes:
        zeros: counts of zeros, rising; the layer goes no lower than the first and no higher than the last.
        loss: at each of them.

    Example:
        >>> Curve((0, 50, 90), (0.0, 1.0, 5.0)).at(70)
        3.0
    """

    zeros: tuple[int, ...]
    loss: tuple[float, ...]

    @property
    def low(self) -> int:
        """The fewest zeros."""
        return self.zeros[0]

    @property
    def high(self) -> int:
        """The most zeros."""
        return self.zeros[-1]

    def at(self, zeros: int) -> float:
        """The loss predicted at a count of zeros."""
        return float(np.interp(zeros, self.zeros, self.loss))

    def starting(self, zeros: int) -> Curve:
        """The same for a layer that has another number of zeros already."""
        low = max(zeros, 0)
        if low >= self.high:
            return Curve((low,), (self.loss[-1],))
        rest = [(z, x) for z, x in zip(self.zeros, self.loss, strict=True) if z > low]
        return Curve((low, *(z for z, _ in rest)), (self.at(low), *(x for _, x in rest)))


def cheapest(curves: Sequence[Curve], gains: Sequence[float], need: float) -> list[int]:
    """Counts of zeros whose gains add up to ``need`` at least, and by less than one weight more, at the least summed loss.

    Minimises ``Σ f_i(z_i)`` subject to ``Σ gain_i · z_i >= need`` and ``low_i <= z_i <= high_i``. Such losses need not be
    convex, so raising one slope after another is not enough: layer by layer, all ways to begin are kept that no other
    way beats in both gain and loss, over the steps of `GRID`. Where that are more than `STATES`, the best of each stretch
    of gains are kept. Then what is too much is given back, and zeros are exchanged between pairs of layers as long as that
    lowers the sum. Exact for layers of no more weights than steps, and `STATES` in all, but for `EVEN`; for larger
    ones to within what a step costs.

    Args:
        curves: one a layer.
        gains: what a zero of each layer is worth, above 0; whole numbers if the sum must be met exactly.
        need: what is to be reached; no more than all layers at their highest give.

    Returns:
        A count for each layer.

    Example:
        >>> cheapest([Curve((0, 50, 90), (0.0, 1.0, 5.0)), Curve((0, 90), (0.0, 9.0))], [1.0, 1.0], 80)
        [50, 30]
    """
    steps = max(COARSEST, min(FINEST, GRID // len(curves)))
    knots = [_knots(c, steps) for c in curves]
    size = [float(np.ptp(c.loss)) for c in curves]
    even = EVEN * (sum(size) or 1.0) / max(sum(c.high for c in curves), 1)
    prices = [
        np.interp(k, c.zeros, c.loss) + even * k.astype(np.float64) ** 2 / max(c.high, 1)
        for k, c in zip(knots, curves, strict=True)
    ]
    worth = np.asarray(gains, np.float64)
    counts = _begin(knots, prices, worth, need)
    lines = [_Line(k.tolist(), p.tolist()) for k, p in zip(knots, prices, strict=True)]
    _give_back(lines, worth, counts, need)
    _exchange(lines, worth, counts)
    _give_back(lines, worth, counts, need)  # where zeros are not worth the same, an exchange may leave a few
    return counts


def _knots(curve: Curve, steps: int) -> np.ndarray:
    """Counts to look at: the measured ones, and a grid between the lowest and the highest."""
    grid = np.round(np.linspace(curve.low, curve.high, min(curve.high - curve.low, steps) + 1)).astype(np.int64)
    return np.union1d(grid, np.asarray(curve.zeros, np.int64))


def _begin(knots: Sequence[np.ndarray], prices: Sequence[np.ndarray], gains: np.ndarray, need: float) -> list[int]:
    """The cheapest choice of a knot for each layer that reaches the need."""
    left = need - sum(g * float(k[0]) for g, k in zip(gains, knots, strict=True))
    rest = np.array([g * float(k[-1] - k[0]) for g, k in zip(gains, knots, strict=True)])
    after = np.append(np.cumsum(rest[::-1])[::-1], 0.0)
    gain, loss = np.zeros(1), np.zeros(1)
    trail = []
    for i, (k, p) in enumerate(zip(knots, prices, strict=True)):
        more = np.minimum(gain[:, None] + gains[i] * (k - k[0]), max(left, 0.0)).ravel()
        spent = (loss[:, None] + p).ravel()
        kept = _unbeaten(more, spent, left - after[i + 1])
        trail.append(kept)
        gain, loss = more[kept], spent[kept]
    at = int(np.argmax(gain))  # nothing unbeaten has as much gain and a lower loss
    counts = []
    for k, kept in zip(reversed(knots), reversed(trail), strict=True):
        at, which = divmod(int(kept[at]), len(k))
        counts.append(int(k[which]))
    return counts[::-1]


def _unbeaten(gain: np.ndarray, loss: np.ndarray, least: float) -> np.ndarray:
    """Where no other has as much gain and no more loss, of those from which the need can still be reached."""
    able = np.flatnonzero(gain >= least - 1e-9 * abs(least))
    order = able[np.lexsort((loss[able], -gain[able]))]  # most gain first
    lowest = np.minimum.accumulate(loss[order])
    kept = order[np.append(True, loss[order][1:] < lowest[:-1])]
    if len(kept) <= STATES:
        return kept
    edges = np.linspace(gain[kept[0]], gain[kept[-1]], STATES)
    return kept[np.unique(np.searchsorted(-gain[kept], -edges))]  # the most gain of each stretch


@dataclass(frozen=True)
class _Line:
    """A layer's knots and prices, walked along one step at a time."""

    knots: list[int]
    prices: list[float]

    def at(self, z: int) -> float:
        i = min(max(bisect_right(self.knots, z) - 1, 0), max(len(self.knots) - 2, 0))
        if len(self.knots) == 1:
            return self.prices[0]
        a, b = self.knots[i], self.knots[i + 1]
        return self.prices[i] + (self.prices[i + 1] - self.prices[i]) * (z - a) / (b - a)

    def up(self, z: int) -> int:
        """Weights to the next knot above."""
        i = bisect_right(self.knots, z)
        return self.knots[i] - z if i < len(self.knots) else 0

    def down(self, z: int) -> int:
        """Weights to the next knot below."""
        i = bisect_left(self.knots, z)
        return z - self.knots[i - 1] if i > 0 else 0

    def rise(self, z: int) -> float:
        """Loss of a weight more."""
        step = self.up(z)
        return (self.at(z + step) - self.at(z)) / step if step else np.inf

    def fall(self, z: int) -> float:
        """Loss that a weight fewer saves."""
        step = self.down(z)
        return (self.at(z) - self.at(z - step)) / step if step else -np.inf


def _give_back(lines: Sequence[_Line], gains: np.ndarray, counts: list[int], need: float) -> None:
    """Takes back zeros that are more than is needed, the dearest first."""
    while True:
        over = sum(g * c for g, c in zip(gains, counts, strict=True)) - need
        able = [i for i, line in enumerate(lines) if line.down(counts[i]) and gains[i] <= over]
        if not able:
            return
        i = max(able, key=lambda j: lines[j].fall(counts[j]) / gains[j])
        counts[i] -= min(lines[i].down(counts[i]), int(over / gains[i]))


def _exchange(lines: Sequence[_Line], gains: np.ndarray, counts: list[int]) -> None:
    """Moves zeros from where they are dear to where they are cheap, from knot to knot, while the sum of losses falls."""
    small = 1e-13 * (1.0 + sum(line.prices[-1] for line in lines))
    rises = [line.rise(z) / g for line, z, g in zip(lines, counts, gains, strict=True)]
    falls = [line.fall(z) / g for line, z, g in zip(lines, counts, gains, strict=True)]
    while True:
        pair = _best_pair(rises, falls)
        if pair is None:
            return
        i, j = pair
        more = min(lines[i].up(counts[i]), int(np.ceil(lines[j].down(counts[j]) * gains[j] / gains[i])))
        fewer = min(lines[j].down(counts[j]), int(more * gains[i] / gains[j]))
        saved = lines[j].at(counts[j]) - lines[j].at(counts[j] - fewer)
        if saved - (lines[i].at(counts[i] + more) - lines[i].at(counts[i])) <= small:
            return
        counts[i] += more
        counts[j] -= fewer
        for k in pair:
            rises[k], falls[k] = lines[k].rise(counts[k]) / gains[k], lines[k].fall(counts[k]) / gains[k]


def _best_pair(rises: Sequence[float], falls: Sequence[float]) -> tuple[int, int] | None:
    """Two different layers: where zeros cost least, and where most is saved; ``None`` if that is no gain."""
    up = sorted(range(len(rises)), key=lambda i: rises[i])[:2]
    down = sorted(range(len(falls)), key=lambda i: -falls[i])[:2]
    pairs = [(i, j) for i in up for j in down if i != j and falls[j] > rises[i]]
    return max(pairs, key=lambda p: falls[p[1]] - rises[p[0]], default=None)
