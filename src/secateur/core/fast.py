"""The same cuts, counts and zeros with fewer passes, where tensors are contiguous memory of this machine.

Every function here returns ``None`` where it does not apply, and the caller goes on with the torch routine that gives the
same answer. The native selection samples a bracket around the k-th key, then one vectorised pass counts what lies below it
and collects what lies inside (about one weight in a hundred), and the exact k-th is found among those few. If the bracket
misses, or too many weights are tied, the histograms of `secateur.core.select` take over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur import native
from secateur.native import Ints

from .keys import FORMATS, key_value
from .patterns import NM
from .select import Cut
from .types import Part, Parts, Spec


@dataclass(frozen=True)
class Picked:
    """What a cut does to one tensor: weights that are zero afterwards and before, smallest survivor, largest key."""

    cut: Cut
    pruned: int
    zeros: int
    threshold: float | None
    largest: int


def seen(t: Tensor) -> bool:
    """Whether native routines can read and write a tensor: contiguous memory of this machine, of a format they know."""
    f = FORMATS.get(t.dtype)
    return f is not None and f.signed_zero and t.device.type == "cpu" and t.is_contiguous() and native.available()


def memory(part: Part) -> Tensor | None:
    """The part as flat memory that native routines can read and write, or ``None``."""
    return part.tensor.detach().view(-1) if seen(part.tensor) else None


def finite(key: int, dtype: torch.dtype) -> float | None:
    """The magnitude of a smallest surviving key; ``None`` if nothing finite survives."""
    return key_value(key, dtype) if key < FORMATS[dtype].nonfinite else None


def whole(spec: Spec, parts: Parts) -> Tensor | None:
    """A tensor that is in memory anyway, in one contiguous piece."""
    found = list(parts(spec, "resident"))
    return memory(found[0]) if len(found) == 1 and found[0].whole else None


def histogram(part: Part, shift: int, width: int, prefix: int | None) -> Tensor | None:
    """How many magnitude keys with the given higher digits have each value of one digit."""
    flat = memory(part)
    if flat is None:
        return None
    bins = torch.zeros(1 << width, dtype=torch.int64)
    native.histogram(flat, shift, prefix or 0, bins)
    return bins


def resident(specs: Sequence[Spec], parts: Parts) -> list[Tensor] | None:
    """Tensors that are in memory anyway, each in one contiguous piece; ``None`` if one is not."""
    flats = []
    for s in specs:
        found = list(parts(s, "resident"))
        flat = memory(found[0]) if len(found) == 1 and found[0].whole else None
        if flat is None:
            return None
        flats.append(flat)
    return flats


def pick(specs: Sequence[Spec], parts: Parts, count: int) -> list[Picked] | None:
    """The cuts of `secateur.core.select.smallest` for magnitudes of one dtype, and what they do.

    NaN and Inf order above every number here; the caller looks at `Picked.largest`.
    """
    if count == 0 or len({s.dtype for s in specs}) != 1 or (flats := resident(specs, parts)) is None:
        return None
    picks = native.pick_all(flats, count)
    return [_picked(s.dtype, p) for s, p in zip(specs, picks, strict=True)] if picks else None


def pick_each(specs: Sequence[Spec], parts: Parts, counts: Sequence[int]) -> list[Picked | None]:
    """`pick` for many tensors, each on its own; ``None`` for a tensor that has to go another way."""
    flats = resident(specs, parts)
    if flats is None:
        return [None] * len(specs)
    picks = native.pick_each(flats, [max(1, c) for c in counts])
    return [None if p is None or c == 0 else _picked(s.dtype, p) for s, p, c in zip(specs, picks, counts, strict=True)]


def _picked(dtype: torch.dtype, pick: native.Pick) -> Picked:
    key, index, pruned, least, zeros, top = pick
    return Picked(Cut(key, index), pruned, zeros, finite(least, dtype), top)


def lost(part: Part, cut: Cut) -> tuple[int, int | None, int] | None:
    """What a cut takes of a contiguous piece of a tensor: (zeros afterwards, smallest key that survives, if any, largest key)."""
    flat = memory(part) if isinstance(part.start, int) else None
    if flat is None:
        return None
    pruned, _, low, top = native.count(flat, *_within(part, cut))
    return pruned, _survivor(low, part), top


def nth(part: Part, key: int, r: int) -> int | None:
    """One past the place, in a piece of a tensor, of the ``r``-th weight with this key; ``-1 - n`` if there are only ``n``."""
    flat = memory(part)
    return None if flat is None else native.tie_index(flat, key, r)


def _within(part: Part, cut: Cut) -> tuple[int, int]:
    """A cut's key, and its index inside a contiguous piece."""
    assert isinstance(part.start, int)
    return cut.key, max(0, cut.index - part.start)


def _survivor(key: int, part: Part) -> int | None:
    return key if key >> FORMATS[part.spec.dtype].bits == 0 else None


def settle(spec: Spec, parts: Parts, cut: Cut) -> Picked | None:
    """What a given cut would do to a tensor, in one read pass."""
    flat = whole(spec, parts)
    if flat is None:
        return None
    pruned, zeros, low, top = native.count(flat, cut.key, cut.index)
    return Picked(cut, pruned, zeros, finite(low, spec.dtype), top)


def settle_each(specs: Sequence[Spec], parts: Parts, cut: Cut) -> list[Picked] | None:
    """`settle` for many tensors that are in memory anyway, with one cut for all."""
    flats = resident(specs, parts)
    if flats is None:
        return None
    found = native.cut_each(flats, [cut.key] * len(flats), [cut.index] * len(flats), False)
    return [
        Picked(cut, pruned, zeros, finite(low, f.dtype), top)
        for f, (pruned, zeros, low, top) in zip(flats, found, strict=True)
    ]


def fill_each(parts: Sequence[Part], cuts: Sequence[Cut]) -> list[tuple[int, float | None]] | None:
    """Writes zeros where whole tensors fall below their cuts; (zeros, smallest survivor) of each, counted while writing."""
    flats = [memory(p) if p.whole and c.level is None else None for p, c in zip(parts, cuts, strict=True)]
    held = [f for f in flats if f is not None]
    if len(held) != len(flats):
        return None
    found = native.cut_each(held, [c.key for c in cuts], [c.index for c in cuts], True)
    return [(pruned, finite(low, f.dtype)) for f, (pruned, _, low, _) in zip(held, found, strict=True)]


def bins(specs: Sequence[Spec], parts: Parts, shift: int) -> list[tuple[int, Ints, Ints]] | None:
    """(zeros, bins ``key >> shift`` that occur, counts) of tensors that are in memory; not of float64, whose bins are many."""
    flats = resident(specs, parts)
    if flats is None or any(s.dtype == torch.float64 for s in specs):
        return None
    return native.bins_of_each(flats, shift)


def keys_in(
    specs: Sequence[Spec], parts: Parts, windows: Sequence[tuple[int, int]], scale_exps: Sequence[int]
) -> list[tuple[Ints, Ints, int]] | None:
    """(magnitude keys in a window, how often each occurs, sum of the scaled squares above) of tensors that are in memory."""
    flats = resident(specs, parts)
    if flats is None or any(s.dtype != torch.float32 for s in specs):
        return None
    return native.keys_of_each(flats, [lo for lo, _ in windows], [hi for _, hi in windows], scale_exps)


def fill(part: Part, cut: Cut) -> tuple[int, int | None] | None:
    """Writes zeros where a contiguous piece of a tensor falls below the cut; (zeros, smallest key that survives), counted while
    writing."""
    flat = memory(part) if isinstance(part.start, int) and cut.level is None else None
    if flat is None:
        return None
    zeros, low = native.fill(flat, *_within(part, cut))
    return zeros, _survivor(low, part)


def groups(part: Part, pattern: NM, write: bool) -> tuple[int, int, int | None, int] | None:
    """N:M at its full count, of a piece with whole groups: (zero afterwards, zero before, smallest key that survives, largest
    key), written if asked."""
    flat = memory(part) if isinstance(part.start, int) else None
    g = pattern.grouping(part.spec)
    if flat is None or not flat.numel() or flat.numel() % g.run:
        return None
    after, before, low, top = native.nm(flat, flat.numel() // g.run, 1, g.of, g.inner, g.most, write)
    return after, before, _survivor(low, part), top
