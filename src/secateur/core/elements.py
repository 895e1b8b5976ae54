"""Elements of tensors as keys, and what a cut does to them: the torch routines, one chunk at a time.

`secateur.native` has routines that give the same bits; `secateur.core.fast` calls those where whole tensors are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secateur.errors import BadTensor

from . import criteria as crit
from .keys import (
    CHUNK,
    FORMATS,
    HIGHEST,
    LOWEST,
    common_dtype,
    comparable,
    convert_cut,
    key_value,
    magnitude_key,
    order_key,
)
from .select import Cut, Keyed, Space, kth_key
from .types import Part, Parts, Reduce, Spec

KeyOf = Callable[[Part], Tensor]
"""Int64 keys of a part, of its shape."""


@dataclass(frozen=True)
class Facts:
    """Counted from a tensor's values: how many are zero, and how many are NaN or infinite."""

    zeros: int
    nonfinite: int


def chunks_of(spec: Spec, parts: Parts, block: int = 1) -> Iterator[Part]:
    """All parts of one tensor in flat chunks of bounded size, none of which cuts a run of ``block`` elements."""
    for part in parts(spec, "chunk" if block == 1 else block):
        yield from part.chunks(_size(block))


def _size(block: int) -> int:
    return max(1, CHUNK // block) * block


def survey(spec: Spec, parts: Parts, reduce: Reduce) -> Facts:
    """Counts zeros and non-finite values of one tensor, over all workers."""
    counts = torch.zeros(2, dtype=torch.int64)
    for chunk in chunks_of(spec, parts):
        keys = magnitude_key(chunk.tensor)
        counts += torch.stack([(keys == 0).sum(), (keys >= FORMATS[spec.dtype].nonfinite).sum()]).cpu()
    zeros, bad = reduce(counts).tolist()
    return Facts(zeros, bad)


def refuse_nonfinite(spec: Spec, count: int) -> None:
    """Raises for a tensor that holds NaN or infinite weights."""
    raise BadTensor(
        f"{spec} holds {count} NaN or infinite weight{'s' if count != 1 else ''}, which have no magnitude to compare. "
        "Repair the model, or say nonfinite='keep' (they survive) or nonfinite='prune' (they go first)."
    )


def dead(part: Part, nonfinite: str) -> Tensor:
    """Where a weight comes first in every order: where it is zero, and under ``nonfinite='prune'`` NaN or infinite."""
    if nonfinite != "prune" and part.tensor.element_size() > 1:  # torch compares no float8
        return part.tensor == 0
    keys = magnitude_key(part.tensor)
    gone = keys == 0
    return gone | (keys >= FORMATS[part.spec.dtype].nonfinite) if nonfinite == "prune" else gone


def not_finite(part: Part) -> Tensor:
    """Where a part is NaN or infinite; bool."""
    return magnitude_key(part.tensor) >= FORMATS[part.spec.dtype].nonfinite


def magnitude_keys(pool: torch.dtype, nonfinite: str) -> KeyOf:
    """Keys of ``|w|`` in the key space of the dtype ``pool``, 0 for `dead` weights."""

    def keys(part: Part) -> Tensor:
        own = part.tensor
        k = magnitude_key(own if own.dtype == pool else own.detach().to(pool))
        return k.masked_fill_(dead(part, nonfinite), 0) if nonfinite == "prune" else k

    return keys


Kept = list[Tensor]
"""Flat scores or keys of the whole parts of one tensor, in their order. The parts themselves are not kept: a store may have
read them from a file."""


def kept_scores(spec: Spec, parts: Parts, criterion: crit.Criterion) -> Kept:
    """The scores of a tensor, for a criterion that is called once a tensor."""
    return [crit.scores(criterion, part).reshape(-1) for part in parts(spec, "whole")]


def score_pieces(
    spec: Spec, parts: Parts, criterion: crit.Criterion, kept: Kept | None, block: int = 1
) -> Iterator[tuple[Part, Tensor]]:
    """Flat parts with their scores, in pieces of bounded size: from ``kept``, or by calling an elementwise criterion."""
    if kept is None:
        for chunk in chunks_of(spec, parts, block):
            yield chunk, crit.scores(criterion, chunk)
    else:
        for part, scores in zip(parts(spec, "whole"), kept, strict=True):
            yield from zip(part.chunks(_size(block)), scores.split(_size(block)), strict=True)


SCORES = Space(64, LOWEST)
"""The key space of scores other than magnitude."""


def magnitude_space(specs: Sequence[Spec]) -> tuple[Space, torch.dtype]:
    """One key space for the magnitudes of tensors of any dtypes, and the dtype it belongs to."""
    pool = common_dtype(s.dtype for s in specs)
    return Space(FORMATS[pool].bits), pool


def keyed_magnitude(spec: Spec, parts: Parts, pool: torch.dtype, nonfinite: str, block: int = 1) -> Keyed:
    """A tensor with its magnitude keys in the space of ``pool``."""
    key_of = magnitude_keys(pool, nonfinite)
    return Keyed(spec, lambda: ((key_of(chunk), chunk) for chunk in chunks_of(spec, parts, block)))


def keyed_scores(spec: Spec, pieces: Callable[[], Iterator[tuple[Part, Tensor]]], nonfinite: str) -> Keyed:
    """A tensor with the order keys of its scores, in the space `SCORES`; `LOWEST` for `dead` weights."""

    def chunks() -> Iterator[tuple[Tensor, Part]]:
        for part, scores in pieces():
            gone = dead(part, nonfinite)
            kept = not_finite(part) if nonfinite == "keep" else None
            # First or last whatever their score, which may well be NaN.
            settled = gone if kept is None else gone | kept
            keys = order_key(comparable(scores, str(spec)).masked_fill(settled, 0), str(spec)).masked_fill_(
                gone, LOWEST
            )
            yield keys if kept is None else keys.masked_fill_(kept, HIGHEST), part

    return Keyed(spec, chunks)


def kept_keys(spec: Spec, parts: Parts, criterion: crit.Criterion, nonfinite: str) -> Kept:
    """The order keys of a tensor, from one call of the criterion a tensor (or a piece, if elementwise)."""
    out = []
    for part in parts(spec, "whole"):
        pieces = part.chunks(CHUNK) if crit.is_elementwise(criterion) else iter([part])
        keys = [
            k.reshape(-1)
            for piece in pieces
            for k, _ in keyed_scores(part.spec, partial(_scored_once, piece, criterion), nonfinite).chunks()
        ]
        out.append(torch.cat(keys))
    return out


def _scored_once(part: Part, criterion: crit.Criterion) -> Iterator[tuple[Part, Tensor]]:
    scores = crit.scores(criterion, part).reshape(-1)
    yield from zip(part.chunks(CHUNK), scores.split(CHUNK), strict=True)


def pieces_of(kept: Kept) -> Iterator[Tensor]:
    """What was kept, in small pieces."""
    return (piece for k in kept for piece in k.split(1 << 12))


def one_value(pieces: Iterable[Tensor]) -> bool:
    """Whether all scores or keys of a tensor's live weights, two or more, are equal; most tensors differ in the first piece.

    >>> one_value([torch.tensor([LOWEST, 7, 7])]), one_value([torch.tensor([7]), torch.tensor([8])])
    (True, False)
    """
    values: set[float] = set()
    live = 0
    for piece in pieces:
        found = piece[(piece != LOWEST) & (piece != HIGHEST)]
        live += found.numel()
        values |= {found.min().item(), found.max().item()} if found.numel() else set()
        if len(values) > 1:
            return False
    return live > 1


def keyed_kept(spec: Spec, parts: Parts, kept: Kept, block: int) -> Keyed:
    """A tensor with order keys that were kept."""

    def chunks() -> Iterator[tuple[Tensor, Part]]:
        for part, keys in zip(parts(spec, "whole"), kept, strict=True):
            yield from zip(keys.split(_size(block)), part.chunks(_size(block)), strict=True)

    return Keyed(spec, chunks)


def own_cuts(cuts: Sequence[Cut], specs: Sequence[Spec], pool: torch.dtype) -> list[Cut]:
    """Cuts found in the key space of ``pool``, each in the keys of its own tensor's dtype."""
    return [Cut(*convert_cut(c.key, c.index, pool, s.dtype)) for c, s in zip(cuts, specs, strict=True)]


def pruned_by(keys: Tensor, part: Part, cut: Cut, lowest: int) -> Tensor:
    """Where a flat part's elements fall below the cut, given their keys; bool."""
    gone = keys < cut.key
    if cut.index:
        start = part.start
        if isinstance(start, int) and start + keys.numel() <= cut.index:
            gone |= keys == cut.key
        elif not isinstance(start, int) or start < cut.index:
            gone |= (keys == cut.key) & (part.index() < cut.index)
    return gone | (keys == lowest)


@dataclass(frozen=True)
class Measured:
    """Counted under a mask: elements that are zero or go, and the smallest finite magnitude that survives, if any."""

    zeros: int
    threshold: float | None


class Meter:
    """Adds up `Measured` over flat pieces of one tensor and the masks that fall on them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._zeros = 0
        self._smallest: int | None = None

    def add(self, values: Tensor, gone: Tensor) -> None:
        """Counts a piece: ``values`` and where they go, of one shape."""
        keys = magnitude_key(values)
        out = gone | (keys == 0)
        beyond = FORMATS[self._dtype].nonfinite
        low = int(torch.where(out, beyond, keys).min()) if keys.numel() else beyond
        self.count(int(out.sum()), low)

    def count(self, zeros: int, smallest: int | None) -> None:
        """Counts a piece of which is known how many weights are zero or go, and the smallest key that survives, if any."""
        self._zeros += zeros
        if smallest is not None and smallest < FORMATS[self._dtype].nonfinite:
            self._smallest = smallest if self._smallest is None else min(smallest, self._smallest)

    def total(self, reduce: Reduce) -> Measured:
        """The counts over all workers."""
        return totals([self], reduce)[0]

    def own(self) -> list[int]:
        """This worker's counts: zeros, whether it knows of a survivor, and the smallest, if so."""
        return [self._zeros, int(self._smallest is not None), self._smallest or 0]

    def measured(self, zeros: int, seen: int, low: int, reduce: Reduce) -> Measured:
        """What the sums of all workers' `own` say; only where several have survivors is there another thing to ask."""
        if seen > 1:
            low = smallest_over_workers(self._smallest, Space(FORMATS[self._dtype].bits), reduce)
        return Measured(zeros, key_value(low, self._dtype) if seen else None)


def totals(meters: Sequence[Meter], reduce: Reduce) -> list[Measured]:
    """The counts of many tensors over all workers, in one sum where each tensor is with one of them."""
    summed = reduce(torch.tensor([m.own() for m in meters], dtype=torch.int64).view(-1, 3))
    return [m.measured(z, seen, low, reduce) for m, (z, seen, low) in zip(meters, summed.tolist(), strict=True)]


def smallest_over_workers(key: int | None, space: Space, reduce: Reduce) -> int:
    """The smallest of the workers' keys, by sums of counts alone; ``None`` from a worker that has none."""
    mine = torch.tensor([] if key is None else [key], dtype=torch.int64)
    spec = Spec("", (1,), torch.int64, "")
    return kth_key([Keyed(spec, lambda: iter([(mine, Part(spec, mine))]))], 1, space, reduce)
