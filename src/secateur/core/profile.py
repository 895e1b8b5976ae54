"""What one pass tells of a tensor's magnitudes: how many weights have each key, or each leading part of one.

Keys of 16 bits and less are known wholly after one pass, so that everything a selection asks of them needs no other. Of
longer keys a pass counts one digit, and the next pass those that begin with the digits found. What was counted is kept, some ten
KiB a tensor (a million normal numbers of bfloat16 have fewer than 2,000 magnitudes), up to `KEPT` bytes in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.native import Ints

from . import fast
from .elements import chunks_of
from .keys import FORMATS, magnitude_key
from .select import Cut, Space
from .types import Part, Parts, Spec

KEPT = 128 << 20
"""Bytes of counts that are kept where nobody says how many; beyond them a digit is counted again whenever it is asked for."""


LAST = 4
"""Digits that are held where there is no room for them: as many as there are of a float64."""


class Digit(NamedTuple):
    """The values of one digit that occur, ascending, and how many keys have each."""

    values: Ints
    counts: Ints

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.values.nbytes + self.counts.nbytes


class Settled(NamedTuple):
    """What a cut does to the weights at hand: how many are zero afterwards, and the smallest key that survives, if any."""

    pruned: int
    smallest: int | None


@dataclass
class Budget:
    """Bytes that may still be kept, by all profiles together, and the last digits for which there was no room: those of one
    tensor, of which the next question mostly is."""

    left: int = KEPT
    last: dict[tuple[str, int, int | None], Digit] = field(default_factory=dict)

    def remember(self, name: str, shift: int, prefix: int | None, digit: Digit) -> None:
        """Holds a digit until there is another of another tensor, or too many of this one."""
        if len(self.last) == LAST or any(n != name for n, _, _ in self.last):
            self.last.clear()
        self.last[name, shift, prefix] = digit


@dataclass
class Profile:
    """The magnitudes of the part of one tensor that this worker holds.

    Args:
        spec: the tensor.
        parts: where its values come from.
        budget: shared with other profiles.

    Example:
        >>> spec = Spec("w", (4,), torch.bfloat16, "linear")
        >>> values = torch.tensor([0.0, -1.0, 2.0, 1.0], dtype=torch.bfloat16)
        >>> p = Profile(spec, lambda s, align: [Part(spec, values)])
        >>> one = int(magnitude_key(values)[1])
        >>> p.zeros, p.count(one), p.settle(Cut(one, 2)).pruned
        (1, (1, 2), 2)
    """

    spec: Spec
    parts: Parts
    budget: Budget = field(default_factory=Budget)
    _known: dict[tuple[int, int | None], Digit] = field(default_factory=dict)
    _ties: dict[tuple[int, int], int] = field(default_factory=dict)

    def digit(self, shift: int, width: int, prefix: int | None) -> Digit:
        """How many keys that begin with ``prefix`` have each value of the digit above ``shift``."""
        found = self._have(shift, prefix)
        if found is None:
            bins = np.zeros(1 << width, np.int64)
            for part in self.parts(self.spec, "chunk"):
                bins += _bins(part, shift, width, prefix)
            live = np.flatnonzero(bins)
            short = np.uint32 if self.spec.numel >> 32 == 0 else np.int64  # there may be thousands of tensors
            found = Digit(live.astype(np.uint16), bins[live].astype(short))
            if found.nbytes <= self.budget.left:
                self.budget.left -= found.nbytes
                self._known[shift, prefix] = found
            else:
                self.budget.remember(self.spec.name, shift, prefix, found)
        return found

    def _have(self, shift: int, prefix: int | None) -> Digit | None:
        found = self._known.get((shift, prefix))
        return self.budget.last.get((self.spec.name, shift, prefix)) if found is None else found

    def histogram(self, shift: int, width: int, prefix: int | None) -> Tensor:
        """`digit` as a table with a number for every value, int64."""
        found = self.digit(shift, width, prefix)
        bins = torch.zeros(1 << width, dtype=torch.int64)
        bins[torch.from_numpy(found.values.astype(np.int64))] = torch.from_numpy(found.counts.astype(np.int64))
        return bins

    @property
    def zeros(self) -> int:
        """How many weights are zero."""
        return self.count(1)[0]

    @property
    def nonfinite(self) -> int:
        """How many weights are NaN or infinite: their keys begin with a digit of their own."""
        shift, width = next(self._space.digits())
        top = self.digit(shift, width, None)
        return int(top.counts[top.values.astype(np.int64) >= FORMATS[self.spec.dtype].nonfinite >> shift].sum())

    def count(self, key: int) -> tuple[int, int]:
        """How many keys are smaller than this one, and how many equal."""
        if key >> self._space.bits:
            return self._size, 0
        below, prefix = 0, None
        for shift, width in self._space.digits():
            found = self.digit(shift, width, prefix)
            values, digit = found.values.astype(np.int64), key >> shift & (1 << width) - 1
            below += int(found.counts[values < digit].sum())
            equal = int(found.counts[values == digit].sum())
            if not equal:
                break
            prefix = key >> shift
        return below, equal

    def nth(self, key: int, ties: int) -> int | None:
        """One past the flat index of the ``ties``-th weight with this key, of which there are more; one pass as far as that.

        0 where nothing of the tensor is here, ``None`` where it is here in part.
        """
        if self._size != self.spec.numel:
            return None if self._size else 0
        left = ties
        for part in self.parts(self.spec, "chunk"):
            if not isinstance(part.start, int):
                return None
            found = _nth(part, key, left)
            if found > 0:
                self._ties[key, part.start + found] = ties
                return part.start + found
            left -= -1 - found
        raise SecateurError(f"{self.spec} changed while it was read; run it again.")

    def settle(self, cut: Cut) -> Settled:
        """What a cut does; one more pass only where it cuts through equal keys and `nth` did not find it, or where the smallest
        survivor is not known."""
        if (ties := self._ties.get((cut.key, cut.index))) is not None:
            return Settled(self.count(cut.key)[0] + ties, cut.key)
        if not cut.index:
            pruned, low = self.count(cut.key)[0], self._at_least(cut.key)
            if low is not None or pruned == self._size:
                return Settled(pruned, low)
        found = [_lost(part, cut) for part in self.parts(self.spec, "chunk")]
        return Settled(sum(p for p, _ in found), min((k for _, k in found if k is not None), default=None))

    @property
    def _space(self) -> Space:
        return Space(FORMATS[self.spec.dtype].bits)

    @property
    def _size(self) -> int:
        shift, width = next(self._space.digits())
        return int(self.digit(shift, width, None).counts.sum())

    def _at_least(self, key: int) -> int | None:
        """The smallest key from this one on, if what is kept tells."""
        prefix: int | None = None
        for shift, width in self._space.digits():
            found = self._have(shift, prefix)
            if found is None:
                return None
            values, wanted = found.values.astype(np.int64), key >> shift & (1 << width) - 1
            at = int(np.searchsorted(values, wanted))
            if at == len(values):
                return None
            prefix = int(values[at]) if prefix is None else prefix << width | int(values[at])
            if values[at] > wanted:
                key = prefix << shift  # any key that begins so will do
        return prefix


def _bins(part: Part, shift: int, width: int, prefix: int | None) -> Ints:
    bins = fast.histogram(part, shift, width, prefix)
    if bins is not None:
        return bins.numpy()
    table = np.zeros(1 << width, np.int64)
    for chunk in _chunks(part):
        keys = magnitude_key(chunk.tensor).reshape(-1)
        if prefix is not None:
            keys = keys[(keys >> (shift + width)) == prefix]
        table += np.bincount((keys >> shift & (1 << width) - 1).cpu().numpy(), minlength=1 << width)
    return table


def _nth(part: Part, key: int, r: int) -> int:
    """As `fast.nth`."""
    found = fast.nth(part, key, r)
    if found is not None:
        return found
    before = seen = 0
    for chunk in _chunks(part):
        at = (magnitude_key(chunk.tensor).reshape(-1) == key).nonzero().reshape(-1)
        if seen + at.numel() >= r:
            return before + int(at[r - seen - 1]) + 1
        before, seen = before + chunk.tensor.numel(), seen + at.numel()
    return -1 - seen


def _lost(part: Part, cut: Cut) -> tuple[int, int | None]:
    """(pruned, smallest key that survives) of one part."""
    found = fast.lost(part, cut)
    if found is not None:
        return found[:2]
    pruned, low = 0, None
    for chunk in _chunks(part):
        keys = magnitude_key(chunk.tensor).reshape(-1)
        gone = (keys < cut.key) | ((keys == cut.key) & (chunk.index().reshape(-1) < cut.index)) | (keys == 0)
        pruned += int(gone.sum())
        left = keys[~gone]
        if left.numel():
            low = int(left.min()) if low is None else min(low, int(left.min()))
    return pruned, low


def _chunks(part: Part) -> Iterator[Part]:
    return chunks_of(part.spec, lambda spec, align: [part])
