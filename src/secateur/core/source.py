"""Values of tensors, and what is made of them: scores, keys, and facts counted on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from . import criteria as crit
from . import fast
from .elements import (
    Facts,
    Kept,
    kept_keys,
    kept_scores,
    keyed_kept,
    keyed_scores,
    one_value,
    pieces_of,
    refuse_nonfinite,
    score_pieces,
    survey,
)
from .keys import FORMATS, comparable
from .profile import Budget, Profile
from .select import Cut, Keyed, identity
from .types import Part, Parts, Reduce, Spec

KEPT = 1 << 22
"""Weights whose keys are kept between passes where the criterion could be called again: 32 MiB."""


@dataclass(frozen=True)
class Source:
    """Where values come from, and what to make of them."""

    parts: Parts
    reduce: Reduce
    criterion: crit.Criterion
    nonfinite: str
    budget: Budget = field(default_factory=Budget)
    _scores: dict[str, Kept] = field(default_factory=dict)
    _keys: dict[str, Kept] = field(default_factory=dict)
    _profiles: dict[str, Profile] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)
    """Names of tensors to whose weights the criterion gave one value; looked for where scores are kept."""

    def scored(self, spec: Spec, block: int = 1) -> Iterator[tuple[Part, Tensor]]:
        """Flat parts with their scores, in pieces of whole runs of ``block`` elements; a criterion that is not elementwise is
        called once a tensor in all."""
        if not crit.is_elementwise(self.criterion) and spec.name not in self._scores:
            self._scores[spec.name] = scores = kept_scores(spec, self.parts, self.criterion)
            self._look_at(spec, (comparable(p, str(spec)) for p in pieces_of(scores)))
        return score_pieces(spec, self.parts, self.criterion, self._scores.get(spec.name), block)

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
        if spec.members:
            each = [self.facts(m) for m in spec.members]
            return Facts(sum(f.zeros for f in each), sum(f.nonfinite for f in each))
        found = fast.settle(spec, self.parts, Cut(1, 0)) if self.alone else None
        if found is not None and found.largest < FORMATS[spec.dtype].nonfinite:
            return Facts(found.zeros, 0)
        if self._profiled:
            return self._facts_together([spec])[0]
        facts = survey(spec, self.parts, self.reduce)
        if facts.nonfinite and self.nonfinite == "error":
            refuse_nonfinite(spec, facts.nonfinite)
        return facts

    def _facts_together(self, specs: Sequence[Spec]) -> list[Facts]:
        """`facts` from profiles, in one sum over the workers."""
        own = [[p.zeros, p.nonfinite] for p in map(self.profile, specs)]
        found = self.reduce(torch.tensor(own, dtype=torch.int64).view(-1, 2)).tolist()
        for spec, (_, bad) in zip(specs, found, strict=True):
            if bad:
                refuse_nonfinite(spec, bad)
        return [Facts(zeros, bad) for zeros, bad in found]

    def profile(self, spec: Spec) -> Profile:
        """The magnitudes of the part of a tensor that this worker holds; counted once."""
        if spec.name not in self._profiles:
            self._profiles[spec.name] = Profile(spec, self.parts, self.budget)
        return self._profiles[spec.name]

    def facts_each(self, specs: Sequence[Spec]) -> list[Facts]:
        """`facts` of many tensors, in one go where they are in memory, and in one sum over the workers."""
        if not self.alone and self._profiled and not any(s.members for s in specs):
            return self._facts_together(specs)
        found: Sequence[fast.Picked | None] | None = None
        if self.alone and not any(s.members for s in specs):
            found = fast.settle_each(specs, self.parts, Cut(1, 0))
        return [
            Facts(p.zeros, 0) if p is not None and p.largest < FORMATS[s.dtype].nonfinite else self.facts(s)
            for s, p in zip(specs, found if found is not None else [None] * len(specs), strict=True)
        ]

    @property
    def _profiled(self) -> bool:
        """Whether a `Profile` tells all about a tensor."""
        return self.by_magnitude and self.nonfinite == "error"

    @property
    def alone(self) -> bool:
        """Whether this is the only worker, so that what lies in its memory is all there is."""
        return self.reduce is identity

    @property
    def by_magnitude(self) -> bool:
        """Whether the criterion is plain magnitude, whose keys need no score."""
        return self.criterion is crit.magnitude
