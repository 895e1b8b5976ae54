"""LAMP: how many weights each tensor loses when all are ranked by layer-adaptive magnitude.

``score(u) = w_u**2 / sum(w_v**2 for v with |w_v| >= |w_u|)``, Lee et al., "Layer-adaptive sparsity for the magnitude-based
pruning" (arXiv:2010.07611). Equal magnitudes get equal scores, as the formula says (the official code ranks ties). Inside a
tensor the score grows with magnitude, so LAMP is an allocation: it decides counts, magnitude decides which.

The sums are sums of integers: squares scaled by a power of two of the tensor's largest and rounded once. A score is one
correctly rounded float64 division of the square by that sum. All that is needed of a tensor is a small table: a count and a
sum for each range of keys. Only the ranges in which the answer may lie are looked at more closely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import fast
from .allocate import Bounds
from .elements import chunks_of
from .keys import CHUNK, FORMATS, magnitude_key
from .select import identity
from .types import Parts, Reduce, Spec
from .units import agree, exponent, larger, rounded, times_power

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
DIGIT = 16
BATCH = 16


@dataclass(frozen=True)
class LampTable:
    """One tensor's ranges of magnitude keys, ascending: ``counts[i]`` weights have keys in ``[first[i], last[i]]``, and
    their scaled squares add up to ``sums[i]``. Ranges that are surely pruned are left out and only counted
    (``below``), those that surely survive only added up (``above``).
    """

    spec: Spec
    exponent: int
    bits: int
    first: Ints
    last: Ints
    counts: Ints
    sums: Ints
    below: int = 0
    above: int = 0

    @property
    def exact(self) -> bool:
        """Whether every range is a single key."""
        return self.first is self.last or bool((self.first == self.last).all())

    def spent(self) -> LampTable:
        """What is left of a table whose scores are known exactly: nothing needs it any more."""
        none = self.first[:0].copy()
        return replace(self, first=none, last=none, counts=none, sums=none)

    def scores(self) -> tuple[Floats, Floats]:
        """(lowest, highest) score that a weight of each range can have; equal where a range is a single key."""
        at_least = np.cumsum(self.sums[::-1])[::-1] + self.above
        low, high = squares(self.spec, self.first, self.exponent), squares(self.spec, self.last, self.exponent)
        above = at_least - self.sums + integers(low, self.bits)
        unit = 2.0**self.bits
        top = low * unit
        if len(top) and not self.above and self.first[-1] == self.last[-1]:
            # Rounded above as below, so that the largest weight of every tensor has exactly the score 1 (1/c if c tie).
            top[-1] = float(integers(low[-1:], self.bits)[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            lowest = np.where(low == 0.0, 0.0, top / at_least)
            highest = np.where(high == 0.0, 0.0, high * unit / above)
        if not self.above:
            highest[-1:] = np.inf  # the largest weight's score is 1 whatever rounding says
        if self.first is self.last:
            return lowest, lowest
        return lowest, np.where(self.first == self.last, lowest, highest)


def squares(spec: Spec, keys: Ints, e: int) -> Floats:
    """``(|w| * 2**-e)**2`` of the magnitudes that keys stand for; at most 1 for those that occur."""
    f = FORMATS[spec.dtype]
    finite = torch.from_numpy(np.minimum(keys, f.nonfinite - 1))
    values = times_power(finite.to(f.view).view(spec.dtype).to(torch.float64), -e)
    return (values * values).numpy()


def integers(values: Floats, bits: int) -> Ints:
    """`rounded` for numpy arrays; values above 1 (of keys that do not occur) are cut off."""
    return rounded(torch.from_numpy(np.minimum(values, 1.0)), bits).numpy()


def lamp_counts(specs: Sequence[Spec], limits: Sequence[Bounds], total: int, parts: Parts, reduce: Reduce) -> list[int]:
    """Counts whose sum is ``total``: those of the smallest ``(score, tensor rank, |w|)``, within the bounds."""
    tables, lows, highs, ends = [], [], [], []
    for table, limit in zip(lamp_tables(specs, parts, reduce), limits, strict=True):
        low, high = table.scores()
        lows.append(low)
        highs.append(high)
        ends.append(_ends(table, limit))
        tables.append(table.spent() if table.exact else table)
    while True:
        exact = all(t.exact for t in tables)
        first = _reach(lows, ends, total)
        last = first if exact else _reach(highs, ends, total)
        if exact:
            break
        loose = [i for i, t in enumerate(tables) if not t.exact]
        for i in loose:  # all are narrowed, and what they were is let go, before any grows again
            tables[i] = narrowed(tables[i], (lows[i] <= last) & (highs[i] >= first), highs[i] < first)
            lows[i] = highs[i] = np.empty(0)
        for i in loose:
            t = tables[i] if tables[i].exact else refine(tables[i], tables[i].first < tables[i].last, parts, reduce)
            (lows[i], highs[i]), ends[i] = t.scores(), _ends(t, limits[i])
            tables[i] = t.spent() if t.exact else t
    below = [int(e[np.searchsorted(v, last, side="left")]) for v, e in zip(lows, ends, strict=True)]
    upto = [int(e[np.searchsorted(v, last, side="right")]) for v, e in zip(lows, ends, strict=True)]
    missing = total - sum(below)
    for i, most in enumerate(upto):
        step = min(most - below[i], missing)
        below[i] += step
        missing -= step
    return below


def narrowed(table: LampTable, open_: NDArray[np.bool_], pruned: NDArray[np.bool_]) -> LampTable:
    """The table of the ranges that are still open; the others are surely pruned, or surely survive."""
    kept = ~(open_ | pruned)
    return replace(
        table, first=table.first[open_], last=table.last[open_], counts=table.counts[open_], sums=table.sums[open_],
        below=table.below + int(table.counts[pruned].sum()), above=table.above + int(table.sums[kept].sum()),
    )  # fmt: skip


def _ends(table: LampTable, limit: Bounds) -> Ints:
    """How many weights lie below each range of a tensor, and below the end, within the tensor's bounds."""
    ends: Ints = np.clip(table.below + np.concatenate([[0], np.cumsum(table.counts)]), limit.low, limit.high)
    return ends


def _reach(scores: Sequence[Floats], ends: Sequence[Ints], total: int) -> float:
    """The smallest score s at which the counts with scores <= s add up to ``total``.

    Bisection over the bits of a float64, which order non-negative numbers; 255 cuts at a time.
    """
    lo, hi = -1, int(np.float64(np.inf).view(np.int64))
    while hi - lo > 1:
        cuts = np.array(sorted({lo + (hi - lo) * i // 256 for i in range(1, 256)} - {lo}), np.int64)
        at = cuts.view(np.float64)
        sums = np.zeros(len(cuts), np.int64)
        for v, e in zip(scores, ends, strict=True):
            sums += e[v.searchsorted(at, side="right")]
        found = int(sums.searchsorted(total))
        lo, hi = int(cuts[found - 1]) if found else lo, int(cuts[found]) if found < len(cuts) else hi
    return float(np.int64(hi).view(np.float64))


def lamp_tables(specs: Sequence[Spec], parts: Parts, reduce: Reduce) -> Iterator[LampTable]:
    """The coarse table of every tensor: zeros, and ranges of the leading 15 bits of the key."""
    for at in range(0, len(specs), BATCH):  # a few at a time: what comes back of each is larger than what is kept
        some = specs[at : at + BATCH]
        same = reduce is identity and len({_shift(s) for s in some}) == 1
        found = fast.lamp_bins(some, parts, _shift(some[0]), [_room(s) for s in some]) if same else None
        if found is None:
            yield from (lamp_table(s, parts, reduce) for s in some)
        for s, (zeros, largest, rows) in zip(some, found or (), strict=found is not None):
            top = exponent(torch.tensor(largest, dtype=torch.float64)) or 0
            yield _table(s, top, zeros, *np.ascontiguousarray(rows.T))


def _shift(spec: Spec) -> int:
    """Bits of the key that a coarse range leaves open."""
    return max(0, FORMATS[spec.dtype].bits - DIGIT + 1)


def _room(spec: Spec) -> int:
    """Bits that one scaled square may take, so that the sum of all fits in 62."""
    return 62 - max(0, (spec.numel - 1).bit_length())


def lamp_table(spec: Spec, parts: Parts, reduce: Reduce) -> LampTable:
    """The coarse table of one tensor, from its parts."""
    shift, bits = _shift(spec), _room(spec)
    zeros, e = 0, None
    for chunk in chunks_of(spec, parts):
        zeros += int((magnitude_key(chunk.tensor) == 0).sum())
        e = larger(e, exponent(chunk.tensor.detach().to(torch.float64)))
    top = agree(e, reduce)
    table = torch.zeros(2, 1 << (FORMATS[spec.dtype].bits - shift), dtype=torch.int64)
    for chunk in chunks_of(spec, parts):
        bins = magnitude_key(chunk.tensor) >> shift
        table[0] += torch.bincount(bins, minlength=table.shape[1]).cpu()
        share = times_power(chunk.tensor.detach().to(torch.float64), -top)
        table[1].index_add_(0, bins.cpu(), rounded(share * share, bits).cpu())
    counts, sums = reduce(table).numpy()
    live = np.flatnonzero(counts)
    return _table(spec, top, int(reduce(torch.tensor([zeros]))[0]), live, counts[live], sums[live])


def _table(spec: Spec, top: int, zeros: int, bins: Ints, counts: Ints, sums: Ints) -> LampTable:
    """A table from the bins that occur, zeros apart from the smallest subnormals that share their bin."""
    shift, bits = _shift(spec), _room(spec)
    first = bins << shift
    last = first + (1 << shift) - 1 if shift else first
    if not shift:  # a bin is a key, so its sum follows from its count
        sums = counts * integers(squares(spec, first, top), bits)
    elif zeros:
        counts = counts - zeros * (np.arange(len(counts)) == 0)
        first, last, counts, sums = (
            np.concatenate([[v], x]) for v, x in ((0, first), (0, last), (zeros, counts), (0, sums))
        )
        first[1] = 1
        live = counts > 0
        first, last, counts, sums = first[live], last[live], counts[live], sums[live]
    return LampTable(spec, top, bits, first, last, counts, sums)


def refine(table: LampTable, which: NDArray[np.bool_], parts: Parts, reduce: Reduce) -> LampTable:
    """The table with some of its ranges cut into at most 2**16 smaller ones each."""
    lows, highs = table.first[which], table.last[which]
    steps = [max(0, int(h - lo).bit_length() - DIGIT) for lo, h in zip(lows, highs, strict=True)]
    columns = [[x[~which]] for x in (table.first, table.last, table.counts, table.sums)]
    pieces = [k.numpy() for k in _keys_between(table.spec, parts, int(lows[0]), int(highs[-1]))]
    keys = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    for lo, hi, s in zip(lows, highs, steps, strict=True):
        inside = (keys >= lo) & (keys <= hi)
        at = (keys[inside] - lo) >> s
        if s == 0 and reduce is identity:  # a digit is a key: its sum follows from its count
            live, counts = np.unique(at.astype(np.int32), return_counts=True)
            live = live.astype(np.int64)
            sums = counts * integers(squares(table.spec, lo + live, table.exponent), table.bits)
        else:
            q = integers(squares(table.spec, keys[inside], table.exponent), table.bits)
            live, counts, sums = _digits(at, q, (int(hi - lo) >> s) + 1, reduce)
        first = lo + (live << s)
        new = (first, np.minimum(first + (1 << s) - 1, hi), counts, sums)
        for column, values in zip(columns, new, strict=True):
            column.append(values)
    merged = [np.concatenate(c) for c in columns]
    order = np.argsort(merged[0], kind="stable")
    first, last, counts, sums = (x[order] for x in merged)
    return replace(table, first=first, last=last, counts=counts, sums=sums)


def _digits(at: Ints, q: Ints, nbins: int, reduce: Reduce) -> tuple[Ints, Ints, Ints]:
    """The digits that occur, how often, and the sums of the integers that go with them, over all workers."""
    table = np.zeros((2, nbins), np.int64)
    table[0] = np.bincount(at, minlength=nbins)
    np.add.at(table[1], at, q)
    counts, sums = reduce(torch.from_numpy(table)).numpy()
    live = np.flatnonzero(counts)
    return live, counts[live], sums[live]


def _keys_between(spec: Spec, parts: Parts, lo: int, hi: int) -> Iterator[Tensor]:
    """All magnitude keys in ``[lo, hi]`` that this worker holds, in pieces, on the CPU."""
    for part in parts(spec, "chunk"):
        found = fast.between(part, lo, hi)
        if found is not None:
            yield found
            continue
        for chunk in part.chunks(CHUNK):
            keys = magnitude_key(chunk.tensor)
            yield keys[(keys >= lo) & (keys <= hi)].cpu()
