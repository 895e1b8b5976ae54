"""The only selection: of all keys ``(score key, tensor rank, flat index)``, the ``count`` smallest.

The keys are unique, so there is one answer, and it is a *cut*: a few integers a tensor, from which any process computes its
part of the mask alone. The k-th key is found digit by digit from histograms. Histograms add: over chunks, tensors, files
and ranks, so nothing is concatenated, gathered or sorted. `secateur.core.fast` finds the same cut with fewer passes where
whole tensors lie in this machine's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .types import Part, Reduce, Spec

FEW = 1 << 20
"""Keys that are collected rather than counted: 8 MiB."""


@dataclass(frozen=True)
class Cut:
    """What to prune of one tensor: its zeros, and every element whose ``(key, flat index)`` is below this pair.

    ``level`` is for N:M on its way to the full pattern: elements whose rank inside their group is lower go whatever their
    key, those whose rank is higher stay, and ``(key, index)`` decides among those of equal rank.
    """

    key: int
    index: int
    level: int | None = None


@dataclass(frozen=True)
class Space:
    """The range of the keys of a selection: ``bits`` wide, from ``lowest`` up."""

    bits: int
    lowest: int = 0

    def digits(self) -> Iterator[tuple[int, int]]:
        """(shift, width) of each digit, most significant first; at most 16 bits each."""
        top = self.bits
        while top > 0:
            width = min(16, top)
            top -= width
            yield top, width


@dataclass(frozen=True)
class Keyed:
    """A tensor and how to read its keys: pairs of flat int64 keys and the `Part` they belong to, in pieces.

    ``histogram(shift, width, prefix)`` and ``count(key)`` are optional faster ways to count one digit of the same keys,
    and those that are (smaller, equal). So is ``nth(key, ties)``, which finds an `index_cut` where one worker has all of the
    tensor: 0 where this one has nothing of it, ``None`` where it has a part.
    """

    spec: Spec
    chunks: Callable[[], Iterator[tuple[Tensor, Part]]]
    histogram: Callable[[int, int, int | None], Tensor | None] | None = None
    count: Callable[[int], tuple[int, int] | None] | None = None
    nth: Callable[[int, int], int | None] | None = None


def identity(counts: Tensor) -> Tensor:
    """The sum over workers where there is only one."""
    return counts


def _digit_counts(keyed: Keyed, shift: int, width: int, prefix: int | None, space: Space) -> Tensor:
    """How many keys with the given higher digits have each value of one digit."""
    fast = keyed.histogram(shift, width, prefix) if keyed.histogram else None
    if fast is not None:
        return fast
    bins = np.zeros(1 << width, np.int64)  # numpy: waking torch's threads for so little costs more than it saves
    for keys, _ in keyed.chunks():
        if prefix is None:
            digit = (keys >> shift) - (space.lowest >> shift)
        else:
            digit = (keys[(keys >> (shift + width)) == prefix] >> shift) & ((1 << width) - 1)
        bins += np.bincount(digit.cpu().numpy(), minlength=1 << width)
    return torch.from_numpy(bins)


def kth_key(tensors: Sequence[Keyed], count: int, space: Space, reduce: Reduce) -> int:
    """The ``count``-th smallest score key of all, ``count`` >= 1."""
    prefix: int | None = None
    remaining = count
    for shift, width in space.digits():
        bins = np.zeros(1 << width, np.int64)
        for t in tensors:
            bins += _digit_counts(t, shift, width, prefix, space).numpy()
        below = reduce(torch.from_numpy(bins)).numpy().cumsum()
        digit = int(np.searchsorted(below, remaining))
        before = int(below[digit - 1]) if digit else 0
        remaining -= before
        prefix = digit + (space.lowest >> shift) if prefix is None else (prefix << width) | digit
        # One pass that collects the few keys left, where more than one digit is missing.
        left = int(below[digit]) - before
        if shift > 16 and reduce is identity and left <= FEW and not all(t.histogram for t in tensors):
            return _kth_among(tensors, remaining, prefix, shift, left)
    assert prefix is not None
    return prefix


def _kth_among(tensors: Sequence[Keyed], count: int, prefix: int, shift: int, size: int) -> int:
    """The ``count``-th smallest of the ``size`` keys with the given higher digits."""
    few, at = torch.empty(size, dtype=torch.int64), 0  # one piece: many small ones would leave holes in memory
    for t in tensors:
        for keys, _ in t.chunks():
            found = keys[(keys >> shift) == prefix]
            few[at : at + found.numel()] = found
            at += found.numel()
    return int(few.kthvalue(count).values)


def index_cut(keyed: Keyed, key: int, ties: int, reduce: Reduce) -> int:
    """The flat index below which exactly ``ties`` elements of one tensor have this key; by digits of the index."""
    if ties == 0:
        return 0
    if keyed.nth is not None:
        mine = keyed.nth(key, ties)
        in_part, at = reduce(torch.tensor([mine is None, mine or 0], dtype=torch.int64)).tolist()
        if not in_part:
            return int(at)
    space = Space(max(1, keyed.spec.numel.bit_length()))

    def tied() -> Iterator[tuple[Tensor, Part]]:
        for keys, part in keyed.chunks():
            at = (keys == key).nonzero().reshape(-1)
            start = part.start
            yield (at + start if isinstance(start, int) else start.reshape(-1)[at]), part

    return kth_key([Keyed(keyed.spec, tied)], ties, space, reduce) + 1


def smallest(tensors: Sequence[Keyed], count: int, space: Space, reduce: Reduce = identity) -> list[Cut]:
    """The cuts that prune exactly the ``count`` smallest keys of the pool, plus every zero.

    Args:
        tensors: in rank order (sorted by name).
        count: 0 <= count <= total number of elements.
        space: of the keys; ``space.lowest`` is the key of weights that are zero.
        reduce: sums int64 counts over the workers that hold the parts.

    Returns:
        One cut a tensor. If the pool holds more zeros than ``count``, the cuts prune the zeros and nothing else.
    """
    first_live = space.lowest + 1
    if count == 0:
        return [Cut(first_live, 0) for _ in tensors]
    key = kth_key(tensors, count, space, reduce)
    if key == space.lowest:
        return [Cut(first_live, 0) for _ in tensors]
    below = torch.zeros(len(tensors), dtype=torch.int64)
    ties = torch.zeros(len(tensors), dtype=torch.int64)
    for i, t in enumerate(tensors):
        below[i], ties[i] = _count(t, key)
    below, ties = reduce(torch.stack([below, ties]))
    return split_ties(tensors, key, count - int(below.sum()), ties.tolist(), reduce)


def _count(keyed: Keyed, key: int) -> tuple[int, int]:
    """How many keys of one tensor are smaller than the given one, and how many equal."""
    fast = keyed.count(key) if keyed.count else None
    if fast is not None:
        return fast
    below = ties = 0
    for keys, _ in keyed.chunks():
        below += int((keys < key).sum())
        ties += int((keys == key).sum())
    return below, ties


def split_ties(tensors: Sequence[Keyed], key: int, left: int, ties: Sequence[int], reduce: Reduce) -> list[Cut]:
    """Hands the last ``left`` prunings among equal keys to the tensors in rank order, lower flat index first."""
    cuts = []
    for t, tied in zip(tensors, ties, strict=True):
        take = min(left, tied)
        left -= take
        cuts.append(Cut(key + 1, 0) if take == tied else Cut(key, index_cut(t, key, take, reduce)))
    return cuts
