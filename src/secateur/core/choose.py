"""Selectors: for each pattern, how to take the smallest of some tensors, and which elements a cut then means.

All three answer the same two questions: `take` finds the cuts for a count over a pool of tensors and says what they do;
`gone` yields a tensor piece by piece with the elements that go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from secateur.errors import Infeasible

from . import fast
from .elements import (
    SCORES,
    Facts,
    Meter,
    keyed_magnitude,
    magnitude_space,
    not_finite,
    own_cuts,
    pruned_by,
    totals,
)
from .groups import Ranked, full_cut, levelled, partial_cuts
from .heads import UnitPattern
from .keys import FORMATS, LOWEST
from .patterns import NM, GroupPattern, Pattern, Row
from .rows import Rows
from .select import Cut, Keyed, Space, smallest
from .source import Source
from .types import Part, Spec
from .units import UnitScorer, UnitTable, pieces_gone, smallest_units, units_gone, within


@dataclass(frozen=True)
class Taken:
    """What a cut does to one tensor: weights that are zero afterwards and before, and the smallest that survives.

    Of a layer of several tensors also what it does to each of them; and then, of all, which units go.
    """

    cut: Cut
    pruned: int
    zeros: int
    threshold: float | None
    members: tuple[Taken, ...] = ()
    units: tuple[int, ...] | None = None


class Selector(Protocol):
    """What every pattern's selector answers."""

    def take(self, specs: Sequence[Spec], count: int) -> list[Taken]:
        """Prunes the ``count`` smallest of a pool of tensors, in rank order (by name)."""
        ...

    def take_each(self, specs: Sequence[Spec], counts: Sequence[int]) -> list[Taken]:
        """`take` for each tensor on its own."""
        ...

    def gone(self, spec: Spec, cut: Cut) -> Iterator[tuple[Part, Tensor]]:
        """One tensor in flat pieces, each with the elements that go (bool)."""
        ...


Pieces = Iterable[tuple[Part, Tensor]]
"""One tensor in flat pieces, each with the elements that go (bool)."""


def _measured(pieces: Pieces, source: Source, spec: Spec, cut: Cut, zeros: int) -> Taken:
    meter, lost = Meter(spec.dtype), 0
    for part, gone in pieces:
        meter.add(part.tensor, gone)
        if source.nonfinite == "keep":
            lost += int((gone & not_finite(part)).sum())
    if int(source.reduce(torch.tensor([lost]))[0]):
        raise Infeasible(
            f'{spec} would lose NaN or infinite weights, which nonfinite="keep" keeps: they are last in the order, but too '
            'few others are left to prune. Ask for less, or say nonfinite="prune".'
        )
    m = meter.total(source.reduce)
    return Taken(cut, m.zeros, zeros, m.threshold)


def settled(selector: Selector, source: Source, spec: Spec, cut: Cut) -> Taken:
    """What a given cut does to one tensor of single weights."""
    return settled_each(selector, source, [spec], [cut])[0]


def settled_each(
    selector: Selector, source: Source, specs: Sequence[Spec], cuts: Sequence[Cut], facts: Sequence[Facts] | None = None
) -> list[Taken]:
    """`settled` of many tensors, in one sum over the workers; ``facts`` of them where they are known."""
    if source.alone and source.by_magnitude and source.nonfinite != "prune":
        picked = [fast.settle(s, source.parts, c) for s, c in zip(specs, cuts, strict=True)]
        if all(p is not None and p.largest < FORMATS[s.dtype].nonfinite for s, p in zip(specs, picked, strict=True)):
            return [Taken(p.cut, p.pruned, p.zeros, p.threshold) for p in picked if p is not None]
    facts = source.facts_each(specs) if facts is None else facts
    if not source.by_magnitude or source.nonfinite != "error":
        each = zip(specs, cuts, facts, strict=True)
        return [_measured(selector.gone(s, c), source, s, c, f.zeros) for s, c, f in each]
    meters = [Meter(s.dtype) for s in specs]
    for meter, spec, cut in zip(meters, specs, cuts, strict=True):
        meter.count(*source.profile(spec).settle(cut))
    found = totals(meters, source.reduce)
    return [Taken(c, m.zeros, f.zeros, m.threshold) for c, f, m in zip(cuts, facts, found, strict=True)]


def _keyed(source: Source, spec: Spec, pool: torch.dtype, block: int = 1) -> Keyed:
    """A tensor with its keys; its `Profile` counts digits of plain magnitudes of the pool's own dtype."""
    if not source.by_magnitude:
        return source.keyed(spec, block)
    keyed = keyed_magnitude(spec, source.parts, pool, source.nonfinite, block)
    if block > 1 or pool != spec.dtype or source.nonfinite == "prune":
        return keyed
    known = source.profile(spec)
    return Keyed(spec, keyed.chunks, known.histogram, known.count, known.nth)


@dataclass(frozen=True)
class Elements:
    """Single weights: the cut is a pair of key and flat index."""

    source: Source

    def take(self, specs: Sequence[Spec], count: int) -> list[Taken]:
        """See `Selector`."""
        s = self.source
        if self._fast and (picked := fast.pick(specs, s.parts, count)) is not None:
            return [self._taken(spec, p) for spec, p in zip(specs, picked, strict=True)]
        facts = s.facts_each(specs)  # refuses NaN and Inf
        space, pool = magnitude_space(specs) if s.by_magnitude else (SCORES, torch.float64)
        keyed = [_keyed(s, spec, pool) for spec in specs]
        cuts = smallest(keyed, count, space, s.reduce)
        if s.by_magnitude:
            cuts = own_cuts(cuts, specs, pool)
        return settled_each(self, s, specs, cuts, facts)

    def take_each(self, specs: Sequence[Spec], counts: Sequence[int]) -> list[Taken]:
        """See `Selector`."""
        none: list[fast.Picked | None] = [None] * len(specs)
        picked = fast.pick_each(specs, self.source.parts, counts) if self._fast else none
        return [
            self._taken(s, p) if p is not None else self.take([s], c)[0]
            for s, c, p in zip(specs, counts, picked, strict=True)
        ]

    @property
    def _fast(self) -> bool:
        return self.source.alone and self.source.by_magnitude and self.source.nonfinite == "error"

    def _taken(self, spec: Spec, p: fast.Picked) -> Taken:
        if p.largest >= FORMATS[spec.dtype].nonfinite:
            self.source.facts(spec)  # refuses
        return Taken(p.cut, p.pruned, p.zeros, p.threshold)

    def gone(self, spec: Spec, cut: Cut) -> Iterator[tuple[Part, Tensor]]:
        """See `Selector`."""
        lowest = 0 if self.source.by_magnitude else SCORES.lowest
        for keys, part in _keyed(self.source, spec, spec.dtype).chunks():
            yield part, pruned_by(keys, part, cut, lowest)


@dataclass(frozen=True)
class Groups:
    """N:M and rows: the cut also names the rank inside a group that it falls in."""

    source: Source
    pattern: GroupPattern
    _held: dict[str, Rows] = field(default_factory=dict)

    def take(self, specs: Sequence[Spec], count: int) -> list[Taken]:
        """See `Selector`; at the full count every tensor is on its own."""
        if isinstance(self.pattern, NM) and count == sum(self.full_count(s) for s in specs):
            return self._full_each(specs)
        s = self.source
        facts = [s.facts(spec) for spec in specs]
        if isinstance(self.pattern, Row):
            (spec,) = specs  # rows compete inside their tensor alone
            cut = self._rows(spec).cut(count, s.reduce)
            return [_measured(self.gone(spec, cut), s, spec, cut, facts[0].zeros)]
        space, pool = magnitude_space(specs) if s.by_magnitude else (SCORES, torch.float64)
        most = self.pattern.of - self.pattern.keep
        cuts = partial_cuts([self._ranks(spec, pool) for spec in specs], most, count, space, s.reduce)
        if s.by_magnitude:
            own = own_cuts(cuts, specs, pool)
            cuts = [Cut(o.key, o.index, c.level) for o, c in zip(own, cuts, strict=True)]
        return [
            _measured(self.gone(spec, c), s, spec, c, f.zeros) for spec, c, f in zip(specs, cuts, facts, strict=True)
        ]

    def take_each(self, specs: Sequence[Spec], counts: Sequence[int]) -> list[Taken]:
        """See `Selector`."""
        if isinstance(self.pattern, NM) and list(counts) == [self.full_count(s) for s in specs]:
            return self._full_each(specs)
        return [self.take([s], c)[0] for s, c in zip(specs, counts, strict=True)]

    def full_count(self, spec: Spec) -> int:
        """How many weights of a tensor the pattern prunes at its full count."""
        g = self.pattern.grouping(spec)
        return spec.numel // max(1, g.of) * g.most

    def _ranks(self, spec: Spec, pool: torch.dtype) -> Ranked:
        grouping = self.pattern.grouping(spec)
        return Ranked(_keyed(self.source, spec, pool, grouping.run), grouping)

    def _rows(self, spec: Spec) -> Rows:
        """A tensor's rows, with what was found of them; of one tensor at a time."""
        if spec.name not in self._held:
            grouping = self.pattern.grouping(spec)
            self._held.clear()
            self._held[spec.name] = Rows(
                _keyed(self.source, spec, spec.dtype, grouping.run), grouping, self._space(spec)
            )
        return self._held[spec.name]

    def _space(self, spec: Spec) -> Space:
        return Space(FORMATS[spec.dtype].bits) if self.source.by_magnitude else SCORES

    def _full_each(self, specs: Sequence[Spec]) -> list[Taken]:
        """Every group at its full count: in one pass and two sums over the workers, where the native routines see all parts."""
        s = self.source
        if not s.by_magnitude or s.nonfinite != "error":
            return [self._full(spec) for spec in specs]
        meters = [Meter(spec.dtype) for spec in specs]
        own = [self._counted(spec, meter) for spec, meter in zip(specs, meters, strict=True)]
        summed = s.reduce(torch.tensor(own, dtype=torch.int64).view(-1, 3)).tolist()
        found = totals(meters, s.reduce)
        taken = []
        for spec, (unseen, zeros, odd), m in zip(specs, summed, found, strict=True):
            if odd:
                s.facts(spec)  # refuses
            known = Taken(self._full_cut(spec), m.zeros, zeros, m.threshold)
            taken.append(self._full(spec) if unseen else known)
        return taken

    def _counted(self, spec: Spec, meter: Meter) -> list[int]:
        """Of what this worker holds: whether the native routines cannot see it, its zeros, and whether it is not finite."""
        assert isinstance(self.pattern, NM)
        zeros = odd = 0
        for part in self.source.parts(spec, self.pattern.grouping(spec).run):
            found = fast.groups(part, self.pattern, write=False)
            if found is None and part.tensor.numel():
                return [1, 0, 0]
            if found is None:
                continue
            meter.count(found[0], found[2])
            zeros, odd = zeros + found[1], odd | int(found[3] >= FORMATS[spec.dtype].nonfinite)
        return [0, zeros, odd]

    def _full_cut(self, spec: Spec) -> Cut:
        assert isinstance(self.pattern, NM)
        return full_cut(self.pattern.grouping(spec), self._space(spec))

    def _full(self, spec: Spec) -> Taken:
        """By torch's routines."""
        cut = self._full_cut(spec)
        return _measured(self.gone(spec, cut), self.source, spec, cut, self.source.facts(spec).zeros)

    def gone(self, spec: Spec, cut: Cut) -> Iterator[tuple[Part, Tensor]]:
        """See `Selector`."""
        assert cut.level is not None
        space = self._space(spec)
        if isinstance(self.pattern, Row):
            keyed = self._rows(spec).levelled(cut.level)
        else:
            keyed = levelled(self._ranks(spec, spec.dtype), cut.level, space)
        for keys, part in keyed.chunks():
            yield part, pruned_by(keys, part, cut, space.lowest)


@dataclass(frozen=True)
class Units:
    """Blocks, channels and heads: the cut is a pair of unit key and unit number, of a tensor or of a layer of several.

    ``most`` caps how many weights of a tensor may be zero afterwards, by name.
    """

    source: Source
    pattern: UnitPattern
    most: dict[str, int] = field(default_factory=dict)
    _tables: dict[str, UnitTable] = field(default_factory=dict)

    def take(self, specs: Sequence[Spec], count: int) -> list[Taken]:
        """See `Selector`."""
        cuts = smallest_units([self.table(s) for s in specs], count, [self.most.get(s.name) for s in specs])
        return [self._taken(spec, c) for spec, c in zip(specs, cuts, strict=True)]

    def _taken(self, spec: Spec, cut: Cut) -> Taken:
        if not spec.members:
            return _measured(self.gone(spec, cut), self.source, spec, cut, self.source.facts(spec).zeros)
        which = units_gone(self.table(spec), cut)
        units = tuple(int(u) for u in which.nonzero().reshape(-1))
        each = [
            replace(_measured(self._pieces(m, which), self.source, m, cut, self.source.facts(m).zeros), units=units)
            for m in spec.members
        ]
        return Taken(cut, sum(t.pruned for t in each), sum(t.zeros for t in each), None, tuple(each), units)

    def _pieces(self, spec: Spec, which: Tensor) -> Pieces:
        for own in spec.members or (spec,):
            yield from pieces_gone(which, self.pattern.grid(own), own, self.source.parts, self.source.nonfinite)

    def take_each(self, specs: Sequence[Spec], counts: Sequence[int]) -> list[Taken]:
        """See `Selector`."""
        return [self.take([s], c)[0] for s, c in zip(specs, counts, strict=True)]

    def dead_weights(self, spec: Spec) -> int:
        """How many weights of a tensor lie in units that are wholly zero: those come first, scattered zeros do not."""
        table = self.table(spec)
        return int((table.keys == LOWEST).sum()) * table.grid.unit_size

    def room(self, spec: Spec) -> int:
        """The largest count that a tensor's cap lets it reach to the unit."""
        table = self.table(spec)
        size = table.grid.unit_size
        return int(within(table, self.most[spec.name]).sum()) * size + max(0, size - 1)

    def table(self, spec: Spec) -> UnitTable:
        """The tensor's units and their keys, made once."""
        if spec.name not in self._tables:
            self.source.facts(spec)
            s = self.source
            scorer = UnitScorer(self.pattern, s.criterion, s.nonfinite, s.parts, s.reduce, s.scored)
            self._tables[spec.name] = scorer.table(spec)
        return self._tables[spec.name]

    def gone(self, spec: Spec, cut: Cut) -> Iterator[tuple[Part, Tensor]]:
        """See `Selector`."""
        yield from self._pieces(spec, units_gone(self.table(spec), cut))


def selector_of(pattern: Pattern, source: Source) -> Selector:
    """The selector of a pattern."""
    if isinstance(pattern, NM | Row):
        return Groups(source, pattern)
    if isinstance(pattern, UnitPattern):
        return Units(source, pattern)
    return Elements(source)
