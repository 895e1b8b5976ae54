"""The one composition: from descriptions, parts and a request to a `Plan`, over any store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from secateur.errors import BadInput, NotDefined, NothingChosen

from .allocate import (
    CAPS,
    PLUS,
    Bounds,
    bounds,
    check_counts,
    erdos_renyi,
    level_counts,
    pick,
    plus_limits,
    prune_count,
    refuse_infeasible,
)
from .bits import pack
from .choose import Groups, Selector, Taken, Units, selector_of, settled
from .criteria import describe, is_named, magnitude
from .elements import Facts
from .heads import NO_ATTENTION, Head, joined
from .keys import key_at_least
from .lamp import Counted, all_finite, count_together, lamp_counts
from .patterns import NM, Channel, Pattern
from .plan import Plan, row_of
from .plan import Row as PlanRow
from .profile import KEPT, Budget
from .request import Request
from .select import Cut, identity
from .source import Source
from .spelling import describe_allocation
from .types import Part, Parts, Reduce, Spec

Match = Callable[[Spec, str], bool]


def make(
    specs: Sequence[Spec], parts: Parts, request: Request, match: Match, reduce: Reduce = identity, kept: int = KEPT
) -> Plan:
    """Makes the plan of a request over the chosen ones of ``specs``; reads values, writes nothing.

    Args:
        specs: all tensors of the store, sorted by name, filters applied.
        parts: the store's values.
        request: what is asked.
        match: whether a glob of a mapping matches a tensor.
        reduce: sums counts over workers.
        kept: bytes that may be kept of what was counted, instead of counting again.

    Raises:
        BadInput, BadTensor, NothingChosen, Infeasible, NotDefined: see `secateur.prune`. Nothing is touched.
    """
    specs, warnings = eligible(specs, request.pattern)
    pools = joined([s for s in specs if s.skip is None], request.pattern)
    maker = _Maker(request, pools, parts, reduce, match, kept)
    asked, taken = maker.allocate()
    by_name: dict[str, tuple[int | None, Taken]] = {}
    for s, a, t in zip(pools, asked, taken, strict=True):
        by_name[s.name] = a, t
        by_name |= {m.name: (None, own) for m, own in zip(s.members, t.members, strict=True)}
    rows = tuple(_planned(s, request, *by_name[s.name]) if s.skip is None else row_of(s) for s in specs)
    masks = None
    if not is_named(request.criterion) and not isinstance(request.pattern, Head):
        masks = {s.name: maker.mask(s, t.cut) for s, t in zip(pools, taken, strict=True)}
    return Plan(
        rows, request.sparsity, request.threshold, describe(request.criterion), describe_allocation(request.allocation),
        request.pattern, request.nonfinite, (*warnings, *odd_rows(rows), *maker.says_nothing()), masks,
    )  # fmt: skip


def counted(
    specs: Sequence[Spec], parts: Parts, request: Request, match: Match, reduce: Reduce = identity
) -> list[PlanRow]:
    """What is known of a plan before a weight is scored: the zeros of every chosen tensor, and how many it is asked to lose. Of
    heads a row is a layer's.

    Args:
        specs: as for `make`, all of which can carry the pattern.
        parts, request, match, reduce: as for `make`; the criterion is not called.

    Returns:
        A row for each chosen tensor, ``asked`` being ``None`` where tensors share a count.

    Raises:
        BadInput, BadTensor, Infeasible: as `make`.
    """
    chosen = joined([s for s in specs if s.skip is None], request.pattern)
    maker = _Maker(replace(request, criterion=magnitude), chosen, parts, reduce, match)
    zeros, counts = [f.zeros for f in maker.facts], maker.counts()
    return [
        row_of(s, zeros=z, asked=None if counts is None else counts[i])
        for i, (s, z) in enumerate(zip(chosen, zeros, strict=True))
    ]


def _planned(spec: Spec, request: Request, asked: int | None, taken: Taken) -> PlanRow:
    pattern = request.pattern
    more: dict[str, Any] = {}
    if isinstance(pattern, Head) and spec.attention is not None:
        more = {"attention": replace(spec.attention, followers=()), "units": taken.units}
    elif is_named(request.criterion):
        more = {"cut": taken.cut}
    if isinstance(pattern, Channel | Head):
        more["followers"] = pattern.grid(spec).followers
    return row_of(
        spec, zeros=taken.zeros, asked=asked, prune=taken.pruned, threshold=taken.threshold, **more
    )  # fmt: skip


def eligible(specs: Sequence[Spec], pattern: Pattern) -> tuple[list[Spec], list[str]]:
    """Skips tensors that cannot carry the pattern, with one warning; refuses one that the user named.

    Heads are of attention alone, so that what lies outside of it is no news.
    """
    out, odd = [], []
    for s in specs:
        why = pattern.why_not(s) if s.skip is None else None
        if why and s.named:
            raise NotDefined(
                f"{s} cannot be pruned in the pattern {pattern}: {why}. Leave it out, or change the pattern."
            )
        if why:
            if not isinstance(pattern, Head) or s.attention is not None:
                odd.append(f"{s.name} ({why})")
            s = replace(s, skip=f"cannot carry {pattern}: {why}")
        out.append(s)
    if all(s.skip for s in out):
        raise NothingChosen(f"no tensor can carry the pattern {pattern}: {'; '.join(odd[:6]) or NO_ATTENTION}.")
    return out, [f"{len(odd)} tensors cannot carry {pattern} and stay dense: {'; '.join(odd)}"] if odd else []


def odd_rows(rows: Sequence[PlanRow]) -> list[str]:
    """What the user should know of tensors that are or will be wholly zero."""
    pruned = [r for r in rows if r.skip is None and r.numel]
    empty = [r.name for r in pruned if r.zeros == r.numel]
    emptied = [r.name for r in pruned if r.prune == r.numel and r.zeros != r.numel]
    out = []
    if empty:
        out.append(f"wholly zero before pruning (zero-initialised?): {', '.join(empty)}")
    if emptied:
        out.append(f"left with nothing: {', '.join(emptied)}; cap them with max_sparsity or min_keep")
    return out


@dataclass
class _Maker:
    """Allocation and selection for one request."""

    request: Request
    specs: list[Spec]
    parts: Parts
    reduce: Reduce
    match: Match
    kept: int = KEPT

    def __post_init__(self) -> None:
        r = self.request
        self.source = Source(self.parts, self.reduce, r.criterion, r.nonfinite, budget=Budget(self.kept))
        facts: list[Facts] | None = None
        if r.nonfinite != "error":
            facts = [self.source.facts(s) for s in self.specs]
            if not any(f.nonfinite for f in facts):
                self.source = replace(self.source, nonfinite="error")
        self._facts = facts
        self._counted: dict[str, Counted] = {}
        self.selector: Selector = selector_of(r.pattern, self.source)

    @property
    def facts(self) -> list[Facts]:
        """`Facts` of every tensor, read once and only when needed."""
        if self._facts is None:
            self._facts = self._counted_facts() or self.source.facts_each(self.specs)
        return self._facts

    def _counted_facts(self) -> list[Facts]:
        """The facts that counting for LAMP gives, which then need no pass of their own."""
        if self.request.allocation != "lamp" or not self.source.alone:
            return []
        self._counted = count_together(self.specs, self.parts)
        return [
            Facts(c.zeros, 0) if all_finite(s, c) else self.source.facts(s)
            for s, c in ((s, self._counted[s.name]) for s in self.specs if self._counted)
        ]

    def allocate(self) -> tuple[list[int | None], list[Taken]]:
        """(count asked of each tensor, what its cut does)."""
        r = self.request
        unknown: list[int | None] = [None] * len(self.specs)
        if r.threshold is not None:
            return unknown, [self._below(s, r.threshold) for s in self.specs]
        if (counts := self.counts()) is not None:
            return list(counts), self._each(counts)
        if isinstance(r.pattern, NM):
            return unknown, self.selector.take(self.specs, self._total())
        return self._pooled()

    def counts(self) -> list[int] | None:
        """The count of each tensor where it is known before any score; ``None`` where the tensors are one pool."""
        r = self.request
        if r.threshold is not None:
            return None
        if isinstance(self.selector, Groups) and isinstance(r.pattern, NM):
            assert r.sparsity is not None
            if r.sparsity < 1 - r.pattern.keep / r.pattern.of:
                return None
            return [self.selector.full_count(s) for s in self.specs]
        return None if r.allocation == "global" else self._counts()

    def _each(self, counts: Sequence[int]) -> list[Taken]:
        return self.selector.take_each(self.specs, counts)

    def _below(self, spec: Spec, threshold: float) -> Taken:
        key, _ = key_at_least(threshold, spec.dtype)
        return settled(self.selector, self.source, spec, Cut(max(1, key), 0))

    def _limits(self) -> list[Bounds]:
        r = self.request
        dropped = self.source.nonfinite == "prune"
        out = []
        for s, f in zip(self.specs, self.facts, strict=True):
            cap = r.max_sparsity
            if isinstance(cap, Mapping):
                cap = pick(cap, s, self.match, "max_sparsity")
            gone, kept = (f.nonfinite, 0) if dropped else (0, f.nonfinite)
            found = bounds(s, f.zeros + gone, cap, max(r.min_keep, kept))
            if isinstance(self.selector, Units):  # only zeros that fill a unit come first
                low, high = self.selector.dead_weights(s), found.high
                if self._capped:
                    self.selector.most[s.name] = high
                    high = max(low, min(high, self.selector.room(s)))
                found = Bounds(low, high)
            out.append(found)
        return out

    @property
    def _capped(self) -> bool:
        return self.request.max_sparsity is not None or self.request.min_keep > 0

    def _rules(self) -> str:
        """What sets the bounds of tensors, for an error to name."""
        r = self.request
        rules = [PLUS] if r.allocation == "uniform_plus" else []
        rules += [CAPS] if self._capped else []
        rules += ['the weights that nonfinite="keep" keeps'] if self.source.nonfinite == "keep" else []
        return " with ".join(rules)

    def _total(self) -> int:
        assert self.request.sparsity is not None
        return prune_count(sum(s.numel for s in self.specs), self.request.sparsity)

    def _pooled(self) -> tuple[list[int | None], list[Taken]]:
        """``"global"``: one pool; tensors that would exceed their cap are held at it, and the others lose more."""
        total = self._total()
        self._check_globs()
        if not self._capped:
            return [None] * len(self.specs), self.selector.take(self.specs, total)
        limits = self._limits()
        if isinstance(self.selector, Units):  # which refuses by whole units
            return [None] * len(self.specs), self.selector.take(self.specs, total)
        refuse_infeasible(self.specs, limits, total, self._rules())
        high = {s.name: b.high for s, b in zip(self.specs, limits, strict=True)}
        held: dict[str, Taken] = {}
        while True:
            free = [s for s in self.specs if s.name not in held]
            left = total - sum(t.pruned for t in held.values())
            found = dict(zip((s.name for s in free), self.selector.take(free, left), strict=True))
            over = [s for s in free if found[s.name].pruned > high[s.name]]
            if not over:
                taken = {**held, **found}
                return [None] * len(self.specs), [taken[s.name] for s in self.specs]
            held.update((s.name, self.selector.take([s], high[s.name])[0]) for s in over)

    def _counts(self) -> list[int]:
        """Counts of the allocations that decide them before looking at which weights."""
        r, specs = self.request, self.specs
        self._check_globs()
        if isinstance(r.allocation, Mapping):
            return self._mapped(r.allocation)
        if callable(r.allocation):
            rows = tuple(row_of(s, zeros=f.zeros) for s, f in zip(specs, self.facts, strict=True))
            return check_counts(r.allocation(rows, r.sparsity), specs)
        assert r.sparsity is not None
        if r.allocation == "uniform":
            return self._uniform(r.sparsity)
        limits = self._limits()
        if r.allocation == "uniform_plus":
            limits = plus_limits(specs, limits)
        total = max(self._total(), sum(b.low for b in limits))
        refuse_infeasible(specs, limits, total, self._rules())
        if r.allocation == "uniform_plus":
            return level_counts([s.numel for s in specs], limits, total)
        if r.allocation == "lamp":
            return lamp_counts(specs, limits, total, self.parts, self.reduce, self._counted)
        return erdos_renyi(specs, limits, total, kernel=r.allocation == "erk")

    def _uniform(self, sparsity: float) -> list[int]:
        counts = [prune_count(s.numel, sparsity) for s in self.specs]
        if not self._capped:
            return counts
        limits = self._limits()
        if all(c <= b.high for c, b in zip(counts, limits, strict=True)):
            return counts
        total = sum(max(c, b.low) for c, b in zip(counts, limits, strict=True))
        refuse_infeasible(self.specs, limits, total, self._rules())
        return level_counts([s.numel for s in self.specs], limits, total)

    def _mapped(self, table: Mapping[str, float]) -> list[int]:
        counts = []
        for s in self.specs:
            share = pick(table, s, self.match, "allocation")
            share = self.request.sparsity if share is None else share
            if share is None:
                raise BadInput(f"the allocation says nothing of {s.name!r}: give sparsity= for the rest (0 leaves it).")
            counts.append(prune_count(s.numel, share))
        return counts

    def _check_globs(self) -> None:
        """A glob of a mapping that matches no chosen tensor is a slip."""
        for what in ("allocation", "max_sparsity"):
            table = getattr(self.request, what)
            for glob in table if isinstance(table, Mapping) else ():
                if not any(self.match(s, glob) for s in self.specs):
                    known = ", ".join(s.name for s in self.specs[:8])
                    raise NothingChosen(f"{what}: {glob!r} matches none of the chosen tensors ({known}, …).")

    def says_nothing(self) -> list[str]:
        """A warning of tensors whose weights the criterion does not tell apart."""
        if not self.source.constant or not self.source.alone:  # a worker sees its own part of a tensor only
            return []
        what = describe(self.request.criterion)
        return [
            f"{what} gives all weights of a tensor one value, so they go by their index: {', '.join(self.source.constant)}"
        ]

    def mask(self, spec: Spec, cut: Cut) -> torch.Tensor:
        """The packed keep-mask of one tensor."""
        pieces = self.selector.gone(spec, cut)
        return pack(~torch.cat([g for _, g in pieces])) if self.source.alone else _together(spec, pieces, self.reduce)


def _together(spec: Spec, pieces: Iterable[tuple[Part, torch.Tensor]], reduce: Reduce) -> torch.Tensor:
    """The packed keep-mask of a tensor whose elements lie with several workers, each with one of them. The bits that a worker
    does not have are 0, so that sums of 64 at a time are all bits."""
    keep = torch.zeros(-(-spec.numel // 64) * 64, dtype=torch.bool)
    for part, gone in pieces:
        keep[part.index().reshape(-1).cpu()] = ~gone.reshape(-1).cpu()
    return reduce(pack(keep).view(torch.int64)).view(torch.uint8)[: (spec.numel + 7) // 8]
