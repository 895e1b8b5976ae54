"""The same cuts, counts and zeros with fewer passes, where a part is contiguous memory of this machine.

Every function here returns ``None`` where it does not apply, and the caller goes on with the torch routine that gives the
same answer. The selection samples a bracket around the k-th key, then one vectorised pass counts what lies below it and
collects what lies inside (about one weight in a hundred), and the exact k-th is found among those few. If the bracket
misses, or too many weights are tied, the histograms of `secateur.core.select` take over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from secateur import native

from .keys import FORMATS, common_dtype, convert_cut, key_at_least, key_value, magnitude_key
from .patterns import NM
from .select import Cut
from .types import Part, Parts, Spec

_SMALL = 1 << 14  # tensors up to this size are collected whole: sampling them would save nothing


@dataclass(frozen=True)
class Picked:
    """What a cut does to one tensor: weights that are zero afterwards and before, smallest survivor, largest key."""

    cut: Cut
    pruned: int
    zeros: int
    threshold: float | None
    largest: int


def memory(part: Part) -> Tensor | None:
    """The part as flat memory that native routines can read and write, or ``None``."""
    t = part.tensor
    f = FORMATS.get(t.dtype)
    if f is None or not f.signed_zero or t.device.type != "cpu" or not t.is_contiguous() or not native.available():
        return None
    return t.detach().view(-1)


def finite(key: int, dtype: torch.dtype) -> float | None:
    """The magnitude of a smallest surviving key; ``None`` if nothing finite survives."""
    return key_value(key, dtype) if key < FORMATS[dtype].nonfinite else None


def whole(spec: Spec, parts: Parts) -> Tensor | None:
    """A tensor that is in memory in one contiguous piece."""
    found = list(parts(spec, "whole"))
    return memory(found[0]) if len(found) == 1 and found[0].whole else None


def extent(part: Part) -> tuple[int, Tensor] | None:
    """How many elements of a part are zero, and its largest magnitude, as a tensor."""
    flat = memory(part)
    if flat is None:
        return None
    zeros, key = native.scan(flat)
    return zeros, torch.tensor(key_value(key, flat.dtype), dtype=torch.float64)


def histogram(part: Part, shift: int, width: int, prefix: int | None) -> Tensor | None:
    """How many magnitude keys with the given higher digits have each value of one digit."""
    flat = memory(part)
    if flat is None:
        return None
    bins = torch.zeros(1 << width, dtype=torch.int64)
    native.histogram(flat, shift, prefix or 0, bins)
    return bins


def between(part: Part, lo: int, hi: int) -> Tensor | None:
    """The magnitude keys of a part that lie in ``[lo, hi]``, int64, in any order."""
    flat = memory(part)
    if flat is None:
        return None
    room = flat.new_empty(flat.numel() // 16 + 4096)
    _, inside, *_ = native.bracket(flat, lo, hi, room)
    return magnitude_key(room[:inside]) if inside >= 0 else None


def lamp_bins(part: Part, shift: int, scale: int, table: Tensor) -> bool:
    """Adds counts and scaled sums of squares of every bin of keys to an int64 table of shape (2, bins), if it can.

    For 16-bit and narrower floats a bin is a key, and the sums follow from the counts alone: they are left to the caller.
    """
    flat = memory(part)
    if flat is None or flat.dtype == torch.float64:
        return False
    if shift == 0:
        native.histogram(flat, 0, 0, table[0])
    else:
        native.lamp_table(flat, shift, scale, table[0], table[1])
    return True


def pick(specs: Sequence[Spec], parts: Parts, count: int) -> list[Picked] | None:
    """The cuts of `secateur.core.select.smallest` for magnitude, and what they do; ``None`` if the bracket misses.

    NaN and Inf order above every number here; the caller looks at `Picked.largest`.
    """
    n = sum(s.numel for s in specs)
    pool = common_dtype(s.dtype for s in specs)
    sample = _sample(specs, parts, pool)
    if sample is None or not n:
        return None
    lo, hi = _window(sample, count / n)
    passes = _bracket(specs, parts, pool, lo, hi)
    if passes is None:
        return None
    rank = count - sum(p.below for p in passes)
    if rank <= 0:
        return [p.picked(Cut(1, 0), p.zeros, 0) for p in passes] if lo == 1 else None
    key = _kth([p.inside for p in passes], rank)
    if key is None:
        return None
    under = [native.count(p.inside, key, 0)[0] for p in passes]
    left, out = rank - sum(under), []
    for p, spec, fewer in zip(passes, specs, under, strict=True):
        ties = native.count(p.inside, key + 1, 0)[0] - fewer
        take = min(ties, left)
        left -= take
        own_key, _ = convert_cut(key if take < ties else key + 1, 0, pool, spec.dtype)
        index = 0
        if 0 < take < ties:
            flat = whole(spec, parts)
            assert flat is not None
            index = native.tie_index(flat, own_key, take)
        out.append(p.picked(Cut(own_key, index), p.below + fewer + take, key if take < ties else key + 1))
    return out


@dataclass(frozen=True)
class _Pass:
    """What one bracket pass found in one tensor: ``inside`` as magnitudes of the pool's dtype, keys of its own."""

    dtype: torch.dtype
    below: int
    inside: Tensor
    zeros: int
    largest: int
    above: int

    def picked(self, cut: Cut, pruned: int, from_key: int) -> Picked:
        """The outcome of a cut that leaves the pool's keys from ``from_key`` up."""
        threshold = finite(native.count(self.inside, from_key, 0)[2], self.inside.dtype)
        if threshold is None:
            threshold = finite(self.above, self.dtype)
        return Picked(cut, pruned, self.zeros, threshold, self.largest)


BATCH = 64 << 20  # bytes of small tensors that are looked at together


def pick_each(specs: Sequence[Spec], parts: Parts, counts: Sequence[int]) -> list[Picked | None]:
    """`pick` for many tensors, each on its own; the threads share out the tensors instead of their elements.

    ``None`` for a tensor that has to go another way: too large, not in memory, nothing to prune, or a sample that misled.
    """
    out: list[Picked | None] = [None] * len(specs)
    batch: list[tuple[int, Tensor]] = []
    held = 0
    for i, s in enumerate(specs):
        size = s.numel * s.dtype.itemsize
        if not 0 < size <= BATCH // 4 or counts[i] == 0:
            continue
        flat = whole(s, parts)
        if flat is None:
            continue
        batch.append((i, flat))
        held += size
        if held > BATCH:
            _pick_batch(batch, counts, out)
            batch, held = [], 0
    _pick_batch(batch, counts, out)
    return out


def _pick_batch(batch: Sequence[tuple[int, Tensor]], counts: Sequence[int], out: list[Picked | None]) -> None:
    if not batch:
        return
    found = native.kth_of_each([flat for _, flat in batch], [counts[i] for i, _ in batch])
    for (i, flat), kth in zip(batch, found, strict=True):
        if kth is None:
            continue
        key, below, ties, above, zeros, top = kth
        take = ties if key == 0 else counts[i] - below
        cut = Cut(key + 1, 0) if take == ties else Cut(key, native.tie_index(flat, key, take))
        out[i] = Picked(cut, below + take, zeros, finite(above if take == ties else key, flat.dtype), top)


def _sample(specs: Sequence[Spec], parts: Parts, pool: torch.dtype) -> Tensor | None:
    """Magnitudes at spread-out positions, tensors in proportion to size; ``None`` if a tensor is not in memory."""
    n = max(1, sum(s.numel for s in specs))
    size = (1 << 16) if len(specs) > 1 else (1 << 12)
    found = []
    for s in specs:
        flat = whole(s, parts)
        if flat is None:
            return None
        bits = flat.view(FORMATS[s.dtype].view)
        share = min(s.numel, math.ceil(size * s.numel / n))
        values = bits[_positions(s.numel, share)].view(s.dtype)
        found.append(values if s.dtype == pool else values.to(pool))
    return torch.cat(found)


@lru_cache(maxsize=64)
def _positions(n: int, share: int) -> Tensor:
    """``share`` positions in ``range(n)``, spread like the fractions of multiples of the golden ratio."""
    spread = (torch.arange(1, share + 1, dtype=torch.float64) * 0.6180339887498949).frac()
    return (spread * n).to(torch.int64)


def _window(sample: Tensor, share: float) -> tuple[int, int]:
    """A range of keys (never 0) that very probably holds the quantile ``share``, from a sample."""
    keys = magnitude_key(sample).numpy()
    size = len(keys)
    margin = 4.5 * math.sqrt(size * share * (1 - share)) + 3
    a, b = math.floor(share * size - margin), math.ceil(share * size + margin)
    inside = [i for i in (a, b) if 0 <= i < size]
    keys = np.partition(keys, inside) if inside else keys
    top = (1 << FORMATS[sample.dtype].bits) - 1
    return max(1, int(keys[a]) if a >= 0 else 1), int(keys[b]) if b < size else top


def _bracket(specs: Sequence[Spec], parts: Parts, pool: torch.dtype, lo: int, hi: int) -> list[_Pass] | None:
    """One read pass over all tensors; ``None`` if far more lies in the bracket than the sample said."""
    if lo >= FORMATS[pool].nonfinite:
        return None
    out = []
    for s in specs:
        flat = whole(s, parts)
        assert flat is not None
        own_lo, _ = convert_cut(lo, 0, pool, s.dtype)
        room = flat.new_empty(s.numel if s.numel <= _SMALL else s.numel // 12)
        found = native.bracket(flat, own_lo, _own_high(hi, pool, s.dtype), room)
        below, inside, zeros, largest_key, above = found
        if inside < 0:
            return None
        kept = room[:inside].clone()
        out.append(_Pass(s.dtype, below, kept if s.dtype == pool else kept.to(pool), zeros, largest_key, above))
    return out


def _own_high(hi: int, pool: torch.dtype, own: torch.dtype) -> int:
    """The largest key of ``own`` whose magnitude is at most that of ``hi`` in the pool; all of them if ``hi`` is no number."""
    if pool == own:
        return hi
    if hi >= FORMATS[pool].nonfinite:
        return (1 << FORMATS[own].bits) - 1
    key, exact = key_at_least(key_value(hi, pool), own)
    return key if exact else key - 1


def _kth(pieces: Sequence[Tensor], rank: int) -> int | None:
    """The key of the ``rank``-th smallest of positive magnitudes (1-based), or ``None`` if there are fewer."""
    values = torch.cat(list(pieces))
    while values.numel() > _SMALL:
        lo, hi = _window(values[_positions(values.numel(), 1 << 11)], rank / values.numel())
        room = torch.empty_like(values)
        below, inside, *_ = native.bracket(values, lo, hi, room)
        if not below < rank <= below + inside or inside == values.numel():
            break
        rank, values = rank - below, room[:inside]
    if not 1 <= rank <= values.numel():
        return None
    return int(np.partition(magnitude_key(values).numpy(), rank - 1)[rank - 1])


def settle(spec: Spec, parts: Parts, cut: Cut) -> Picked | None:
    """What a given cut would do to a tensor, in one read pass."""
    flat = whole(spec, parts)
    if flat is None:
        return None
    pruned, zeros, low, top = native.count(flat, cut.key, cut.index)
    return Picked(cut, pruned, zeros, finite(low, spec.dtype), top)


def fill(part: Part, cut: Cut) -> tuple[int, float | None] | None:
    """Writes zeros where a whole tensor falls below the cut; (zeros, smallest survivor) counted while writing."""
    flat = memory(part) if part.whole else None
    if flat is None or cut.level is not None:
        return None
    zeros, low = native.fill(flat, cut.key, cut.index)
    return zeros, finite(low, flat.dtype)


def groups(part: Part, pattern: NM, write: bool) -> tuple[int, int, float | None, int] | None:
    """N:M at its full count: (zero afterwards, zero before, smallest survivor, largest key), written if asked."""
    flat = memory(part) if part.whole else None
    if flat is None or not flat.numel():
        return None
    outer, count, inner = pattern.layout(part.spec)
    after, before, low, top = native.nm(flat, outer, count, pattern.of, inner, pattern.of - pattern.keep, write)
    return after, before, finite(low, flat.dtype), top
