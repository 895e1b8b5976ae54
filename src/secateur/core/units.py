"""Blocks, channels and heads: score units by sums of integers, select units, expand.

Values are scaled by a power of two of the tensor's largest and rounded once, so their sums do not depend on the order of
addition and add over chunks, threads, shards and ranks, like histograms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import BadTensor, Infeasible

from . import criteria as crit
from . import fast
from .allocate import CAPS
from .elements import chunks_of, dead, not_finite
from .heads import Slices, UnitPattern
from .keys import CHUNK, LOWEST, comparable, key_value, magnitude_key, order_key
from .patterns import Grid, Reduction
from .select import Cut
from .tiles import Tiles
from .types import Part, Parts, Reduce, Spec

_SLOTS, _ZERO_SLOT = 2200, 1100  # one slot for each binary exponent of float64, subnormals included


@dataclass(frozen=True)
class UnitTable:
    """The units of a tensor, or of a layer of several: order keys (int64, `LOWEST` for units that are wholly zero) and weights
    that are not zero."""

    spec: Spec
    grid: Grid | Slices
    keys: Tensor
    live: Tensor


@dataclass(frozen=True)
class UnitScorer:
    """Makes the `UnitTable` of any tensor or layer; every worker gets the same."""

    pattern: UnitPattern
    criterion: crit.Criterion
    nonfinite: str
    parts: Parts
    reduce: Reduce
    scored: Callable[[Spec, int], Iterator[tuple[Part, Tensor]]]

    def table(self, spec: Spec) -> UnitTable:
        """The keys of one tensor's units."""
        grid = self.pattern.grid(spec)
        if isinstance(self.criterion, crit.RandomCriterion):
            scores, live = self._first(spec, grid), self._live(spec, grid)
        else:
            scores, live = self._reduced(spec, grid, self.pattern.reduce or "l2")
        keys = order_key(scores, str(spec)).masked_fill_(live == 0, LOWEST)
        return UnitTable(spec, grid, keys, live)

    def _pieces(self, spec: Spec) -> Iterator[tuple[Part, Tensor]]:
        """Flat parts with the float64 values that a unit's score is made of: 0 where dead or not finite."""
        for own in spec.members or (spec,):
            for part, scores in self.scored(own, self._tiles(own).run):
                values = comparable(scores, str(own)).masked_fill(dead(part, self.nonfinite), 0.0)
                bad = ~torch.isfinite(values)
                if self.criterion is not crit.magnitude and bool(bad.any()):
                    raise BadTensor(
                        f"the criterion {crit.describe(self.criterion)} returned NaN or infinite scores for {own}, which "
                        f"have no sum over the units of {self.pattern}: return finite scores."
                    )
                yield part, values.masked_fill_(bad, 0.0)

    def _tiles(self, spec: Spec) -> Tiles:
        return Tiles(self.pattern.grid(spec))

    def _refuse_signs(self, spec: Spec, negative: int, reduction: Reduction) -> None:
        """A norm of scores with a sign has not their order: the lowest would come out highest."""
        if int(self.reduce(torch.tensor([negative]))[0]) and reduction in ("l1", "l2"):
            raise BadTensor(
                f"the criterion {crit.describe(self.criterion)} returned negative scores for {spec}, and {reduction} is a "
                f'norm, which loses their sign: say reduce="mean" or "max" in the pattern, or return scores >= 0.'
            )

    def _reduced(self, spec: Spec, grid: Grid | Slices, reduction: Reduction) -> tuple[Tensor, Tensor]:
        """(scores, live weights) of every unit."""
        top = self._top(spec, reduction)
        squared = reduction == "l2"
        bits = 62 - max(0, (grid.unit_size - 1).bit_length())
        table = torch.zeros(3, grid.units, dtype=torch.int64)
        for part, values in self._pieces(spec):
            tiles = self._tiles(part.spec)
            share = times_power(values, -top).cpu()
            if reduction == "max":
                # Shifted above zero, so that a worker that holds nothing of a unit can say 0 and tables can be added.
                # So do zeros: they come first, and must not keep a unit whose scores are negative.
                shifted = (rounded(share, 60) + (1 << 60)).masked_fill_(dead(part, self.nonfinite).cpu(), 0)
                tiles.add(table[0], part, shifted, "amax")
            else:
                tiles.add(table[0], part, rounded(share * share if squared else share, bits))
            tiles.add(table[1], part, (~dead(part, self.nonfinite)).cpu())
            if self.nonfinite == "keep":
                tiles.add(table[2], part, not_finite(part).cpu())
        sums, live, bad = self.reduce(table)
        if reduction == "max":
            sums, bits = sums - (1 << 60), 60
        scores = times_power(sums.to(torch.float64), -bits)
        scores = {"mean": lambda x: x / grid.unit_size, "l2": torch.sqrt}.get(reduction, lambda x: x)(scores)
        scores = times_power(scores, top)
        if self.nonfinite == "keep":
            scores = scores.masked_fill(bad > 0, float("inf"))
        return scores, live

    def _top(self, spec: Spec, reduction: Reduction) -> int:
        """The smallest exponent above all values, of all workers."""
        e, negative = None, 0
        if self.criterion is crit.magnitude and self.nonfinite == "error":  # keys tell
            for own in spec.members or (spec,):
                keys = [_largest_key(part) for part in self.parts(own, "chunk")]
                value = key_value(max(keys, default=0), own.dtype)
                e = larger(e, math.frexp(value)[1] if value else None)
        else:
            for _, values in self._pieces(spec):
                e = larger(e, exponent(values))
                negative += int((values < 0).sum()) if self.criterion is not crit.magnitude else 0
        self._refuse_signs(spec, negative, reduction)
        return agree(e, self.reduce)

    def _live(self, spec: Spec, grid: Grid | Slices) -> Tensor:
        live = torch.zeros(grid.units, dtype=torch.int64)
        for own in spec.members or (spec,):
            tiles = self._tiles(own)
            for chunk in chunks_of(own, self.parts, tiles.run):
                tiles.add(live, chunk, (~dead(chunk, self.nonfinite)).cpu())
        return self.reduce(live)

    def _first(self, spec: Spec, grid: Grid | Slices) -> Tensor:
        """The score of each unit's id: a mean of many hashes would put large units in the middle of the order."""
        assert isinstance(self.criterion, crit.RandomCriterion)
        ids = torch.arange(grid.units)
        return self.criterion(ids, name=spec.name, index=ids)


def _largest_key(part: Part) -> int:
    found = fast.lost(part, Cut(1, 0))
    if found is not None:
        return found[2]
    return max((int(magnitude_key(c.tensor).max()) for c in part.chunks(CHUNK) if c.tensor.numel()), default=0)


def exponent(values: Tensor) -> int | None:
    """The smallest ``e`` with ``|v| < 2**e`` for all values, or ``None`` if all are zero.

    >>> exponent(torch.tensor([0.75, -3.0])), exponent(torch.zeros(2))
    (2, None)
    """
    largest = values.abs().max() if values.numel() else torch.tensor(0.0)
    return int(torch.frexp(largest.to(torch.float64)).exponent) if float(largest) else None


def larger(a: int | None, b: int | None) -> int | None:
    """The larger of two exponents, where ``None`` is below all."""
    return b if a is None else a if b is None else max(a, b)


def agree(e: int | None, reduce: Reduce) -> int:
    """The largest exponent of all workers, by a sum of one-hot counts; 0 where nobody has any."""
    slots = torch.zeros(_SLOTS, dtype=torch.int64)
    if e is not None:
        slots[e + _ZERO_SLOT] = 1
    seen = reduce(slots).nonzero()
    return int(seen[-1]) - _ZERO_SLOT if seen.numel() else 0


def times_power(values: Tensor, power: int) -> Tensor:
    """``values * 2**power`` (float64), in two steps so that the factor itself never overflows."""
    half = power // 2
    return values * 2.0**half * 2.0 ** (power - half)


def rounded(values: Tensor, bits: int) -> Tensor:
    """``round(values * 2**bits)`` as int64, half to even, for ``|values| <= 1`` and ``bits <= 62``."""
    return torch.round(values * float(1 << bits)).to(torch.int64)


def within(table: UnitTable, most: int | None) -> Tensor:
    """Which units may go without more than ``most`` of the tensor's weights being zero afterwards; bool.

    Those are the first in order; single zeros in units that stay count too, and units that are zero already may always go.
    """
    if most is None:
        return torch.ones_like(table.keys, dtype=torch.bool)
    order = torch.sort(table.keys, stable=True).indices
    zeros = table.grid.units * table.grid.unit_size - int(table.live.sum())
    fits = table.live[order].cumsum(0) <= max(0, most - zeros)
    return torch.zeros_like(fits).scatter_(0, order, fits)


def smallest_units(tables: Sequence[UnitTable], count: int, most: Sequence[int | None]) -> list[Cut]:
    """The cuts that prune the most units, taken in order, whose weights do not exceed ``count``; zero units always.

    Units of tensors that are at their cap (``most`` weights zero) are passed over. Units are few beside weights, and every
    worker holds the whole (added) table, so this one sorts.

    Raises:
        Infeasible: all units that the caps allow go, and ``count`` has room for the next one that they hold back.
    """
    if not tables:
        return []
    keys = torch.cat([t.keys for t in tables])
    sizes = torch.cat([torch.full((t.grid.units,), t.grid.unit_size) for t in tables])
    allowed = torch.cat([within(t, m) for t, m in zip(tables, most, strict=True)])
    order = torch.sort(keys, stable=True).indices
    held, order = order[~allowed[order]], order[allowed[order]]
    used = sizes[order].cumsum(0)
    fits = int((used <= count).sum())
    most_allowed = int(used[-1]) if used.numel() else 0
    if held.numel() and fits == order.numel() and most_allowed + int(sizes[held[0]]) <= count:
        n = int(sizes.sum())
        raise Infeasible(
            f"{count} of {n} weights are to go, but in whole units {CAPS} allow only {most_allowed} "
            f"({most_allowed / n:.4%} of them). Ask for a lower sparsity, or loosen the caps."
        )
    gone = torch.zeros_like(allowed)
    gone[order[: max(fits, int((keys == LOWEST).sum()))]] = True
    return [_last_of(t, g) for t, g in zip(tables, gone.split([t.grid.units for t in tables]), strict=True)]


def _last_of(table: UnitTable, gone: Tensor) -> Cut:
    """The cut just after the last unit of a tensor that goes, in the tensor's order."""
    which = gone.nonzero().reshape(-1)
    if not which.numel():
        return Cut(LOWEST + 1, 0)
    key = table.keys[which].max()
    index = int(which[table.keys[which] == key].max()) + 1
    return Cut(int(key), index) if int(key) > LOWEST else Cut(LOWEST + 1, 0)


def units_gone(table: UnitTable, cut: Cut) -> Tensor:
    """Which units of one tensor go; bool."""
    at = torch.arange(table.grid.units)
    return (table.keys < cut.key) | ((table.keys == cut.key) & (at < cut.index)) | (table.keys == LOWEST)


def pieces_gone(
    gone: Tensor, grid: Grid | Slices, spec: Spec, parts: Parts, nonfinite: str
) -> Iterator[tuple[Part, Tensor]]:
    """One tensor in flat pieces, each with the elements that go (bool), from which of its units go.

    Single zeros inside a unit that survives are zeros, not prunings, and stay.
    """
    tiles = Tiles(grid)
    for part in parts(spec, tiles.align):
        for chunk in part.chunks(max(1, (1 << 20) // tiles.run) * tiles.run):
            out = tiles.spread(gone, chunk)
            yield chunk, out | dead(chunk, "prune") if nonfinite == "prune" else out
