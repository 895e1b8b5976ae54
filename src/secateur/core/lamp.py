"""LAMP: how many weights each tensor loses when all are ranked by layer-adaptive magnitude.

``score(u) = w_u**2 / sum(w_v**2 for v with |w_v| >= |w_u|)``, Lee et al., "Layer-adaptive sparsity for the magnitude-based
pruning" (arXiv:2010.07611). Equal magnitudes get equal scores, as the formula says (the official code ranks ties). Inside a
tensor the score grows with magnitude, so LAMP is an allocation: it decides counts, magnitude decides which.

The sums are sums of integers: squares scaled by a power of two of the tensor's largest and rounded once. A score is one
correctly rounded float64 division of the square by that sum. First the weights of every tensor are counted in bins of keys;
that bounds the sums, and with them the scores. Only the ranges in which the answer may lie are looked at more closely.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from secateur.native import Ints

from . import fast
from .allocate import Bounds
from .elements import chunks_of
from .keys import FORMATS, key_value, magnitude_key
from .ranges import Floats, Ranges, ends_of, integers, known, squares
from .select import identity
from .types import Parts, Reduce, Spec
from .units import agree, exponent, larger

DIGIT = 16
BATCH = 16
GROUP = 64
FRACTION_BITS = 8


@dataclass(frozen=True)
class Counted:
    """One tensor's weights in bins, ``key >> shift``: those that occur, ascending, and how many weights each holds. Weights
    that are zero are counted too, and apart. ``exponent`` is the smallest ``e`` with ``|w| < 2**e``, if not that of a bin."""

    zeros: int
    bins: Ints
    counts: Ints
    exponent: int | None = None


def lamp_counts(
    specs: Sequence[Spec], limits: Sequence[Bounds], total: int, parts: Parts, reduce: Reduce,
    counted: dict[str, Counted] | None = None,
) -> list[int]:  # fmt: skip
    """Counts whose sum is ``total``: those of the smallest ``(score, tensor rank, |w|)``, within the bounds.

    Args:
        specs: the tensors, in rank order; their weights are finite.
        limits: the bounds of each.
        total: how many weights go in all.
        parts: the store's values.
        reduce: sums counts over workers.
        counted: tensors in bins, by name, where they have been counted already; taken out as they are used.
    """
    batches = [_Batch(which, limits) for which in _batches(specs)]
    for b in batches:
        some = [specs[i] for i in b.which]
        found = [counted.pop(s.name) if counted else count(s, parts, reduce) for s in some]
        b.look(ranges_of(some, found), GROUP)
    while True:
        first = _reach([b.low for b in batches], batches, total)
        loose = [b for b in batches if not b.exact]
        if not loose:
            break
        last = _reach([b.high for b in batches], batches, total)
        for b in loose:  # all are narrowed, and what they were is let go, before any grows again
            b.narrow(first, last)
        for b in loose:
            b.look(b.ranges, 1) if b.group > 1 else b.look(refined(b.ranges, parts, reduce), GROUP)
    below, upto = np.zeros((2, len(specs)), np.int64)
    for b in batches:
        below[b.which], upto[b.which] = b.counts(first)
    missing = total - int(below.sum())
    for i in range(len(specs)):
        step = min(int(upto[i] - below[i]), missing)
        below[i] += step
        missing -= step
    return [int(c) for c in below]


class _Batch:
    """Some tensors of one dtype, and what the search needs of them: scores, and how many weights go with each range.

    Ranges are looked at in groups of neighbours first, so that most never get a score of their own.
    """

    def __init__(self, which: list[int], limits: Sequence[Bounds]) -> None:
        self.which = which
        self._bounds = np.array([[limits[i].low, limits[i].high] for i in which], np.int64).T

    def look(self, ranges: Ranges, group: int) -> None:
        """Scores ranges, ``group`` of them at a time."""
        self.ranges, self.group = ranges, group
        self._seen, self._sizes = ranges.grouped(group)
        self.low, self.high = self._seen.scores()
        self.base, self.weights = self._seen.within(*self._bounds)
        self.starts = self._seen.starts
        self.exact = group == 1 and ranges.exact

    def narrow(self, first: float, last: float) -> None:
        """Keeps the ranges that may hold the score at which the total is reached, between ``first`` and ``last``."""
        open_, pruned = (self.low <= last) & (self.high >= first), self.high < first
        rest = self._seen.narrowed(open_, pruned)
        self.ranges = replace(self.ranges.only(np.repeat(open_, self._sizes)), below=rest.below, above=rest.above)
        self._seen = rest

    def counts(self, score: float) -> tuple[Ints, Ints]:
        """How many weights of each tensor score less, and how many no more."""
        below, upto = (ends_of(np.where(which, self.weights, 0)) for which in (self.low < score, self.low <= score))
        ends, starts = self.starts[1:], self.starts[:-1]
        return self.base + below[ends] - below[starts], self.base + upto[ends] - upto[starts]


def _batches(specs: Sequence[Spec]) -> Iterator[list[int]]:
    """A few tensors of one dtype at a time: what is made of each is larger than what is kept."""
    order = sorted(range(len(specs)), key=lambda i: str(specs[i].dtype))
    for _, group in groupby(order, key=lambda i: specs[i].dtype):
        some = list(group)
        for at in range(0, len(some), BATCH):
            yield some[at : at + BATCH]


def _reach(scores: Sequence[Floats], batches: Sequence[_Batch], total: int) -> float:
    """The smallest score s at which the counts with scores <= s add up to ``total``."""
    missing = total - sum(int(b.base.sum()) for b in batches)
    if missing <= 0:
        return 0.0
    every = np.concatenate(scores)
    order = np.argsort(every)
    upto = np.cumsum(np.concatenate([b.weights for b in batches])[order])
    return float(every[order[np.searchsorted(upto, missing)]])


def count_together(specs: Sequence[Spec], parts: Parts) -> dict[str, Counted]:
    """`count` of tensors that are in memory, which need not be finite; empty if one is not in memory."""
    found: dict[str, Counted] = {}
    for which in _batches(specs):
        some = [specs[i] for i in which]
        bins = fast.bins(some, parts, _shift(some[0].dtype))
        if bins is None:
            return {}
        found.update((s.name, _compact(s, *b)) for s, b in zip(some, bins, strict=True))
    return found


def _compact(spec: Spec, zeros: int, bins: Ints, counts: Ints) -> Counted:
    """In 32 bits where they hold, since there are thousands of bins a tensor: a key of 31 bits, and a count below 2**31."""
    if FORMATS[spec.dtype].bits > 31 or spec.numel >> 31:
        return Counted(zeros, bins, counts)
    return Counted(zeros, bins.astype(np.int32), counts.astype(np.int32))


def all_finite(spec: Spec, counted: Counted) -> bool:
    """Whether no weight of a tensor is NaN or infinite; their keys fill bins of their own."""
    return not len(counted.bins) or int(counted.bins[-1]) < FORMATS[spec.dtype].nonfinite >> _shift(spec.dtype)


def _shift(dtype: torch.dtype) -> int:
    """Bits of the key that a bin leaves open: all but the exponent and the leading bits of the fraction."""
    f = FORMATS[dtype]
    fraction = (f.nonfinite & -f.nonfinite).bit_length() - 1 if f.bits > 15 else 0
    return max(0, fraction - FRACTION_BITS)


def _room(spec: Spec) -> int:
    """Bits that one scaled square may take, so that the sum of all fits in 62."""
    return 62 - max(0, (spec.numel - 1).bit_length())


def _exponent(dtype: torch.dtype, counted: Counted) -> int:
    """The smallest ``e`` with ``|w| < 2**e`` for all weights of the last bin."""
    if counted.exponent is not None or not len(counted.bins):
        return counted.exponent or 0
    last = (int(counted.bins[-1]) + 1 << _shift(dtype)) - 1
    value = key_value(min(last, FORMATS[dtype].nonfinite - 1), dtype)
    return math.frexp(value)[1] if value else 0


def count(spec: Spec, parts: Parts, reduce: Reduce) -> Counted:
    """One tensor in bins, from its parts."""
    shift, zeros, e = _shift(spec.dtype), 0, None
    table = torch.zeros(1 << (FORMATS[spec.dtype].bits - shift), dtype=torch.int64)
    for chunk in chunks_of(spec, parts):
        keys = magnitude_key(chunk.tensor)
        zeros += int((keys == 0).sum())
        table += torch.bincount(keys >> shift, minlength=len(table)).cpu()
        if spec.dtype == torch.float64:  # its bin of subnormals is too wide to scale by
            e = larger(e, exponent(chunk.tensor.detach()))
    counts = reduce(table).numpy()
    live = np.flatnonzero(counts)
    zeros = int(reduce(torch.tensor([zeros]))[0])
    return Counted(zeros, live, counts[live], agree(e, reduce) if spec.dtype == torch.float64 else None)


def ranges_of(specs: Sequence[Spec], counted: Sequence[Counted]) -> Ranges:
    """The ranges of tensors of one dtype; zeros count as pruned, so the first bin begins behind them."""
    dtype = specs[0].dtype
    shift = _shift(dtype)
    exponents = np.array([_exponent(dtype, c) for c in counted], np.int64)
    bits = np.array([_room(s) for s in specs], np.int64)
    starts = ends_of(np.array([len(c.bins) for c in counted], np.int64))
    counts = np.concatenate([c.counts for c in counted])
    first = np.concatenate([c.bins for c in counted]) << shift
    last = first | ((1 << shift) - 1) if shift else first
    zeros = np.array([c.zeros for c in counted], np.int64)
    holed = starts[:-1][zeros > 0]  # zeros are in the first bin, with the smallest subnormals where a bin is wider
    counts[holed] -= zeros[zeros > 0].astype(counts.dtype)
    live = counts > 0
    first[holed] = np.minimum(1, last[holed])
    sizes = np.diff(starts)

    def sums(keys: Ints) -> Ints:
        return counts * integers(squares(dtype, keys, exponents, sizes), bits, sizes)

    bounds = np.stack([sums(first), sums(last)]) if shift else known(sums(first))
    everything = Ranges(
        specs, exponents, bits, starts, first, last, counts, bounds, zeros, np.zeros((2, len(specs)), np.int64)
    )
    return everything if live.all() else everything.only(live)


def refined(ranges: Ranges, parts: Parts, reduce: Reduce) -> Ranges:
    """The ranges cut into single keys, or into at most 2**16 smaller ones each, with sums that are known."""
    if reduce is identity and (found := _keys_in(ranges, parts)) is not None:
        return found
    pieces = [_closer(ranges, t, parts, reduce) for t in range(len(ranges.specs))]
    first, last, counts, sums = (np.concatenate(column) for column in list(zip(*pieces, strict=True))[:4])
    above = np.array([p[4] for p in pieces], np.int64)
    starts = ends_of(np.array([len(p[0]) for p in pieces], np.int64))
    return replace(ranges, starts=starts, first=first, last=last, counts=counts, sums=known(sums), above=known(above))


def _keys_in(ranges: Ranges, parts: Parts) -> Ranges | None:
    """Every key from the first to the last range of each tensor, where tensors are in memory."""
    top = FORMATS[ranges.specs[0].dtype].nonfinite
    windows = [
        (int(ranges.first[a]), int(ranges.last[b - 1])) if a < b else (top, top)
        for a, b in zip(ranges.starts[:-1], ranges.starts[1:], strict=True)
    ]
    found = fast.keys_in(ranges.specs, parts, windows, (ranges.bits - 2 * ranges.exponents).tolist())
    if found is None:
        return None
    keys, counts = (np.concatenate([f[i] for f in found]) for i in (0, 1))
    starts, above = ends_of(np.array([len(f[0]) for f in found], np.int64)), np.array([f[2] for f in found], np.int64)
    sizes = np.diff(starts)
    q = integers(squares(ranges.specs[0].dtype, keys, ranges.exponents, sizes), ranges.bits, sizes)
    return replace(
        ranges, starts=starts, first=keys, last=keys, counts=counts, sums=known(counts * q), above=known(above)
    )


def _closer(ranges: Ranges, t: int, parts: Parts, reduce: Reduce) -> tuple[Ints, Ints, Ints, Ints, int]:
    """The ranges of one tensor, each cut into at most 2**16 smaller ones, and the sum of what lies above all of them."""
    here, spec = slice(ranges.starts[t], ranges.starts[t + 1]), ranges.specs[t]
    lows, highs = ranges.first[here], ranges.last[here]
    if not len(lows):
        return lows, highs, lows, lows, 0
    keys, above = np.empty(0, np.int64), 0
    for chunk in chunks_of(spec, parts):
        found = magnitude_key(chunk.tensor).cpu().numpy()
        over = found[found > highs[-1]]
        above += int(_scaled(ranges, t, over).sum())
        keys = np.concatenate([keys, found[(found >= lows[0]) & (found <= highs[-1])]])
    q, columns = _scaled(ranges, t, keys), [[], [], [], []]  # type: tuple[Ints, list[list[Ints]]]
    for lo, hi in zip(lows, highs, strict=True):
        step = max(0, int(hi - lo).bit_length() - DIGIT)
        inside = (keys >= lo) & (keys <= hi)
        live, counts, sums = _digits((keys[inside] - lo) >> step, q[inside], (int(hi - lo) >> step) + 1, reduce)
        first = lo + (live << step)
        for column, new in zip(columns, (first, np.minimum(first + (1 << step) - 1, hi), counts, sums), strict=True):
            column.append(new)
    first, last, counts, sums = (np.concatenate(c) for c in columns)
    return first, last, counts, sums, int(reduce(torch.tensor([above]))[0])


def _scaled(ranges: Ranges, t: int, keys: Ints) -> Ints:
    """The scaled squares of keys of one tensor."""
    sizes = np.full(1, len(keys))
    exponents, bits = ranges.exponents[t : t + 1], ranges.bits[t : t + 1]
    return integers(squares(ranges.specs[t].dtype, keys, exponents, sizes), bits, sizes)


def _digits(at: Ints, q: Ints, nbins: int, reduce: Reduce) -> tuple[Ints, Ints, Ints]:
    """The digits that occur, how often, and the sums of the integers that go with them, over all workers."""
    table = np.zeros((2, nbins), np.int64)
    table[0] = np.bincount(at, minlength=nbins)
    np.add.at(table[1], at, q)
    counts, sums = reduce(torch.from_numpy(table)).numpy()
    live = np.flatnonzero(counts)
    return live, counts[live], sums[live]
