"""Selectors: for each pattern, how to take the smallest of some tensors, and which elements a cut then means.

All three answer the same two questions: `take` finds the cuts for a count over a pool of tensors and says what they do;
`gone` yields a tensor piece by piece with the elements that go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from secateur.errors import Infeasible

from . import criteria as crit
from . import fast
from .elements import (
    SCORES,
    Facts,
    Kept,
    Meter,
    dead,
    kept_keys,
    kept_scores,
    keyed_kept,
    keyed_magnitude,
    keyed_scores,
    magnitude_space,
    not_finite,
    one_value,
    own_cuts,
    pieces_of,
    pruned_by,
    refuse_nonfinite,
    score_pieces,
    survey,
)
from .groups import Ranked, full_cut, levelled, partial_cuts
from .keys import FORMATS, LOWEST, comparable
from .patterns import NM, Block, Channel, GroupPattern, Pattern, Row, UnitPattern
from .rows import Rows
from .select import Cut, Keyed, Space, identity, smallest
from .types import Align, Part, Parts, Reduce, Spec
from .units import UnitScorer, UnitTable, expand, smallest_units, units_gone, within

KEPT = 1 << 22
"""Weights whose keys are kept between passes where the criterion could be called again: 32 MiB."""


@dataclass(frozen=True)
class Source:
    """Where values come from, and what to make of them."""

    parts: Parts
    reduce: Reduce
    criterion: crit.Criterion
    nonfinite: str
    _scores: dict[str, Kept] = field(default_factory=dict)
    _keys: dict[str, Kept] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)
    """Names of tensors to whose weights the criterion gave one value; looked for where scores are kept."""

    def scored(self, spec: Spec, align: Align = "chunk") -> Iterator[tuple[Part, Tensor]]:
        """Flat parts with their scores; a criterion that is not elementwise is called once a tensor in all."""
        if not crit.is_elementwise(self.criterion) and spec.name not in self._scores:
            self._scores[spec.name] = scores = kept_scores(spec, self.parts, self.criterion)
            self._look_at(spec, (comparable(p, str(spec)) for p in pieces_of(scores)))
        return score_pieces(spec, self.parts, self.criterion, self._scores.get(spec.name), 1, align)

    def keyed(self, spec: Spec, block: int = 1) -> Keyed:
        """A tensor with the order keys of its scores. They are kept, 8 bytes a weight, where the criterion is called once a
        tensor; of an elementwise one only up to `KEPT` weights in all, beyond which every pass scores again."""
        if spec.name not in self._keys:
            if crit.is_elementwise(self.criterion) and self._kept + spec.numel > KEPT:
                pieces = partial(score_pieces, spec, self.parts, self.criterion, None, block)
                return keyed_scores(spec, pieces, self.nonfinite)
            self._keys[spec.name] = keys = kept_keys(spec, self.parts, self.criterion, self.nonfinite)
            self._look_at(spec, pieces_of(keys))
        return keyed_kept(spec, self.parts, self._keys[spec.name], block)

    def _look_at(self, spec: Spec, pieces: Iterable[Tensor]) -> None:
        if one_value(pieces):
            self.constant.append(spec.name)

    @property
    def _kept(self) -> int:
        return sum(k.numel() for keys in self._keys.values() for k in keys)

    def facts(self, spec: Spec) -> Facts:
        """Zeros and non-finite values of one tensor; refuses the latter unless the user said what to do with them."""
        found = fast.settle(spec, self.parts, Cut(1, 0)) if self.alone else None
        if found is not None and found.largest < FORMATS[spec.dtype].nonfinite:
            return Facts(found.zeros, 0)
        facts = survey(spec, self.parts, self.reduce)
        if facts.nonfinite and self.nonfinite == "error":
            refuse_nonfinite(spec, facts.nonfinite)
        return facts

    def facts_each(self, specs: Sequence[Spec]) -> list[Facts]:
        """`facts` of many tensors, in one go where they are in memory."""
        found: Sequence[fast.Picked | None] | None = None
        if self.alone:
            found = fast.settle_each(specs, self.parts, Cut(1, 0))
        return [
            Facts(p.zeros, 0) if p is not None and p.largest < FORMATS[s.dtype].nonfinite else self.facts(s)
            for s, p in zip(specs, found if found is not None else [None] * len(specs), strict=True)
        ]

    @property
    def alone(self) -> bool:
        """Whether this is the only worker, so that what lies in its memory is all there is."""
        return self.reduce is identity

    @property
    def by_magnitude(self) -> bool:
        """Whether the criterion is plain magnitude, whose keys need no score."""
        return self.criterion is crit.magnitude


@dataclass(frozen=True)
class Taken:
    """What a cut does to one tensor: weights that are zero afterwards and before, and the smallest that survives."""

    cut: Cut
    pruned: int
    zeros: int
    threshold: float | None


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


def _measured(selector: Selector, source: Source, spec: Spec, cut: Cut, zeros: int) -> Taken:
    meter, lost = Meter(spec.dtype), 0
    for part, gone in selector.gone(spec, cut):
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
    plain = source.alone and source.by_magnitude and source.nonfinite != "prune"
    found = fast.settle(spec, source.parts, cut) if plain else None
    if found is None or found.largest >= FORMATS[spec.dtype].nonfinite:
        return _measured(selector, source, spec, cut, source.facts(spec).zeros)
    return Taken(cut, found.pruned, found.zeros, found.threshold)


def _keyed(source: Source, spec: Spec, pool: torch.dtype, block: int = 1) -> Keyed:
    """A tensor with its keys; `fast` counts digits of plain magnitudes of the pool's own dtype."""
    if not source.by_magnitude:
        return source.keyed(spec, block)
    keyed = keyed_magnitude(spec, source.parts, pool, source.nonfinite, block)
    if block > 1 or pool != spec.dtype or source.nonfinite == "prune":
        return keyed
    return Keyed(spec, keyed.chunks, partial(_histogram, spec, source.parts), partial(_count_ties, spec, source.parts))


def _histogram(spec: Spec, parts: Parts, shift: int, width: int, prefix: int | None) -> Tensor | None:
    bins = [fast.histogram(p, shift, width, prefix) for p in parts(spec, "chunk")]
    return (
        sum((b for b in bins if b is not None), torch.zeros(1 << width, dtype=torch.int64))
        if None not in bins
        else None
    )


def _count_ties(spec: Spec, parts: Parts, key: int) -> tuple[int, int] | None:
    found = [fast.count_ties(p, key) for p in parts(spec, "chunk")]
    counted = [f for f in found if f is not None]
    return (sum(b for b, _ in counted), sum(t for _, t in counted)) if len(counted) == len(found) else None


@dataclass(frozen=True)
class Elements:
    """Single weights: the cut is a pair of key and flat index."""

    source: Source

    def take(self, specs: Sequence[Spec], count: int) -> list[Taken]:
        """See `Selector`."""
        s = self.source
        if self._fast and (picked := fast.pick(specs, s.parts, count)) is not None:
            return [self._taken(spec, p) for spec, p in zip(specs, picked, strict=True)]
        for spec in specs:
            s.facts(spec)  # refuses NaN and Inf
        space, pool = magnitude_space(specs) if s.by_magnitude else (SCORES, torch.float64)
        keyed = [_keyed(s, spec, pool) for spec in specs]
        cuts = smallest(keyed, count, space, s.reduce)
        if s.by_magnitude:
            cuts = own_cuts(cuts, specs, pool)
        return [settled(self, s, spec, c) for spec, c in zip(specs, cuts, strict=True)]

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
            return [self._full(s) for s in specs]
        s = self.source
        facts = [s.facts(spec) for spec in specs]
        if isinstance(self.pattern, Row):
            (spec,) = specs  # rows compete inside their tensor alone
            return [_measured(self, s, spec, self._rows(spec).cut(count, s.reduce), facts[0].zeros)]
        space, pool = magnitude_space(specs) if s.by_magnitude else (SCORES, torch.float64)
        most = self.pattern.of - self.pattern.keep
        cuts = partial_cuts([self._ranks(spec, pool) for spec in specs], most, count, space, s.reduce)
        if s.by_magnitude:
            own = own_cuts(cuts, specs, pool)
            cuts = [Cut(o.key, o.index, c.level) for o, c in zip(own, cuts, strict=True)]
        return [_measured(self, s, spec, c, f.zeros) for spec, c, f in zip(specs, cuts, facts, strict=True)]

    def take_each(self, specs: Sequence[Spec], counts: Sequence[int]) -> list[Taken]:
        """See `Selector`."""
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

    def _full(self, spec: Spec) -> Taken:
        s = self.source
        assert isinstance(self.pattern, NM)
        cut = full_cut(self.pattern.grouping(spec), self._space(spec))
        if s.alone and s.by_magnitude and s.nonfinite == "error":
            found = [fast.groups(p, self.pattern, write=False) for p in s.parts(spec, "whole")]
            if len(found) == 1 and found[0] is not None:
                after, before, threshold, top = found[0]
                if top >= FORMATS[spec.dtype].nonfinite:
                    s.facts(spec)
                return Taken(cut, after, before, threshold)
        return _measured(self, s, spec, cut, s.facts(spec).zeros)

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
    """Blocks and channels: the cut is a pair of unit key and unit number.

    ``most`` caps how many weights of a tensor may be zero afterwards, by name.
    """

    source: Source
    pattern: UnitPattern
    most: dict[str, int] = field(default_factory=dict)
    _tables: dict[str, UnitTable] = field(default_factory=dict)

    def take(self, specs: Sequence[Spec], count: int) -> list[Taken]:
        """See `Selector`."""
        cuts = smallest_units([self.table(s) for s in specs], count, [self.most.get(s.name) for s in specs])
        return [
            _measured(self, self.source, spec, c, self.source.facts(spec).zeros)
            for spec, c in zip(specs, cuts, strict=True)
        ]

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
            scorer = UnitScorer(
                self.pattern, s.criterion, s.nonfinite, s.parts, s.reduce, partial(s.scored, align="unit")
            )
            self._tables[spec.name] = scorer.table(spec)
        return self._tables[spec.name]

    def gone(self, spec: Spec, cut: Cut) -> Iterator[tuple[Part, Tensor]]:
        """See `Selector`. Single zeros inside a unit that survives are zeros, not prunings, and stay."""
        table = self.table(spec)
        which = units_gone(table, cut)
        for part in self.source.parts(spec, "chunk"):
            for chunk in part.chunks(1 << 20):
                gone = expand(table, which, chunk)
                yield chunk, gone | dead(chunk, "prune") if self.source.nonfinite == "prune" else gone


def selector_of(pattern: Pattern, source: Source) -> Selector:
    """The selector of a pattern."""
    if isinstance(pattern, NM | Row):
        return Groups(source, pattern)
    if isinstance(pattern, Block | Channel):
        return Units(source, pattern)
    return Elements(source)
