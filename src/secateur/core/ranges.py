"""Ranges of magnitude keys, with what is known of the weights in each: what LAMP's scores are bounded by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.native import Ints

from .keys import FORMATS
from .types import Spec

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ranges:
    """Ranges of magnitude keys of some tensors of one dtype, ascending within each tensor, one tensor after the other.

    ``counts[i]`` weights have keys in ``[first[i], last[i]]``, and their squares, those of ``|w| * 2**-exponent`` in ``bits``
    bits, add up to something from ``sums[0, i]`` to ``sums[1, i]``. The ranges of tensor t are those from ``starts[t]`` to
    ``starts[t + 1]``. Weights that are surely pruned are left out and only counted (``below``, one number a tensor), those
    that surely survive only added up (``above``, from and to).
    """

    specs: Sequence[Spec]
    exponents: Ints
    bits: Ints
    starts: Ints
    first: Ints
    last: Ints
    counts: Ints
    sums: Ints
    below: Ints
    above: Ints

    @property
    def sizes(self) -> Ints:
        """How many ranges each tensor has."""
        return np.diff(self.starts)

    @property
    def exact(self) -> bool:
        """Whether every range is a single key, and every sum is known."""
        return all(bool((x == y).all()) for x, y in ((self.first, self.last), self.sums, self.above))

    def per_tensor(self, values: Ints) -> Ints:
        """The sums of values a range over the ranges of each tensor; they wrap around like int64."""
        ends = ends_of(values)
        return ends[..., self.starts[1:]] - ends[..., self.starts[:-1]]

    def scores(self) -> tuple[Floats, Floats]:
        """(lowest, highest) score that a weight of each range can have; equal where all is known."""
        sizes, ends = self.sizes, ends_of(self.sums)
        unit = np.repeat(np.ldexp(1.0, self.bits), sizes)
        at_least = np.repeat(ends[:, self.starts[1:]] + self.above, sizes, axis=1) - ends[:, :-1]
        low = squares(self.specs[0].dtype, self.first, self.exponents, sizes)
        smallest = np.rint(low * unit)
        top = low * unit
        whole = np.flatnonzero(
            (self.above[1] == 0) & (np.diff(self.starts) > 0)
        )  # tensors whose largest weight is here
        largest = self.starts[whole + 1] - 1
        single = self.first == self.last
        # Rounded above as below, so that the largest weight of every tensor has exactly the score 1 (1/c if c tie).
        top[largest[single[largest]]] = smallest[largest[single[largest]]]
        with np.errstate(divide="ignore", invalid="ignore"):
            lowest: Floats = np.where(low == 0.0, 0.0, top / at_least[1])
            if self.exact:
                return lowest, lowest
            high = np.where(single, top, squares(self.specs[0].dtype, self.last, self.exponents, sizes) * unit)
            others = np.where(single, at_least[0], at_least[0] - self.sums[0] + smallest.astype(np.int64))
            highest = np.where(high == 0.0, 0.0, high / others)
        highest[largest] = np.inf  # the largest weight's score is 1 whatever rounding says
        return lowest, highest

    def within(self, low: Ints, high: Ints) -> tuple[Ints, Ints]:
        """Within the tensors' bounds: how many weights go before the first range, and how many more with each range."""
        ends, sizes = ends_of(self.counts), self.sizes
        offset, least, most = (np.repeat(x, sizes) for x in (self.below - ends[self.starts[:-1]], low, high))

        def bounded(counts: Ints) -> Ints:
            clipped: Ints = np.clip(counts + offset, least, most)
            return clipped

        return np.clip(self.below, low, high), bounded(ends[1:]) - bounded(ends[:-1])

    def grouped(self, size: int) -> tuple[Ranges, Ints]:
        """Neighbours joined into ranges of up to ``size`` of them, and how many each one joins."""
        edges = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)
        heads = np.concatenate([np.arange(a, b, size) for a, b in edges])
        sizes = np.diff(heads, append=len(self.first))
        if size == 1 or not len(heads):
            return self, sizes
        counts, sums = np.add.reduceat(self.counts, heads), np.add.reduceat(self.sums, heads, axis=1)
        starts = np.searchsorted(heads, self.starts)
        first, last = self.first[heads], self.last[heads + sizes - 1]
        return replace(self, starts=starts, first=first, last=last, counts=counts, sums=sums), sizes

    def narrowed(self, open_: NDArray[np.bool_], pruned: NDArray[np.bool_]) -> Ranges:
        """The ranges that are still open; the others are surely pruned, or surely survive."""
        kept = ~(open_ | pruned)
        found = self.only(open_)
        below = self.below + self.per_tensor(np.where(pruned, self.counts, 0))
        return replace(found, below=below, above=self.above + self.per_tensor(np.where(kept, self.sums, 0)))

    def only(self, which: NDArray[np.bool_]) -> Ranges:
        """Some of the ranges, as if the others held nothing."""
        starts = ends_of(self.per_tensor(which.astype(np.int64)))
        first, last, counts = self.first[which], self.last[which], self.counts[which]
        return replace(self, starts=starts, first=first, last=last, counts=counts, sums=self.sums[:, which])


def ends_of(values: Ints) -> Ints:
    """Sums up to each place, from none to all, along the last dim."""
    ends: Ints = np.zeros((*values.shape[:-1], values.shape[-1] + 1), np.int64)
    np.cumsum(values, axis=-1, out=ends[..., 1:])
    return ends


def known(sums: Ints) -> Ints:
    """Sums as both bounds of themselves."""
    return np.broadcast_to(sums, (2, *sums.shape))


def squares(dtype: torch.dtype, keys: Ints, exponents: Ints, sizes: Ints) -> Floats:
    """``(|w| * 2**-e)**2`` of the magnitudes that keys stand for, e that of each one's tensor; at most 1: those of keys that do
    not occur are cut off."""
    f = FORMATS[dtype]
    finite = torch.from_numpy(np.minimum(keys, f.nonfinite - 1))
    values = finite.to(f.view).view(dtype).to(torch.float64).numpy()
    if dtype == torch.float64:  # in two steps, so that the factor itself never overflows
        half = -exponents // 2
        values = values * np.repeat(np.ldexp(1.0, half), sizes)
        exponents = exponents + half
    values = values * np.repeat(np.ldexp(1.0, -exponents), sizes)
    squared: Floats = np.minimum(values * values, 1.0)
    return squared


def integers(values: Floats, bits: Ints, sizes: Ints) -> Ints:
    """``values``, at most 1, in each one's tensor's ``bits`` bits, rounded half to even."""
    found: Ints = np.rint(values * np.repeat(np.ldexp(1.0, bits), sizes)).astype(np.int64)
    return found
