"""Rows: groups as long as an output row, which may go wholly. The same key and the same cut as for N:M, without sorting.

Every row loses its elements of the ranks below one level, and some rows that of the level itself: those with the smallest keys.
What lies below a rank, at it and above it is told by the row's k-th key, which costs a fraction of a sort.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .patterns import Grouping
from .select import Cut, Keyed, Space, smallest
from .types import Part, Reduce


class Rows:
    """A tensor as rows of keys.

    Args:
        keyed: chunks of whole runs of rows.
        grouping: the tensor's rows.
        space: of the keys; ``space.lowest`` is that of weights that are zero.
    """

    def __init__(self, keyed: Keyed, grouping: Grouping, space: Space) -> None:
        self.keyed, self.grouping, self.space = keyed, grouping, space
        self._found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def cut(self, count: int, reduce: Reduce) -> Cut:
        """The cut that prunes exactly ``count`` weights, or those that are zero if there are more of them."""
        below, upto = self._counts(reduce)
        level = min(int(torch.searchsorted(upto, count)), len(upto) - 1)
        left = max(0, count - (int(upto[level - 1]) if level else below))
        return replace(
            smallest([Keyed(self.keyed.spec, lambda: self._at(level))], left, self.space, reduce)[0], level=level
        )

    def levelled(self, level: int) -> Keyed:
        """The same tensor with keys for one level: lower ranks get the lowest key, higher ranks the highest."""
        lowest = self.space.lowest
        highest = lowest + (1 << self.space.bits) - 1
        place = torch.arange(self.grouping.of)

        def chunks() -> Iterator[tuple[Tensor, Part]]:
            for rows, part, key, at in self._with_rank(level):
                later = rows > key
                later |= (rows == key) & (place.to(rows.device) > at) & (rows != lowest)
                keys = torch.where(later, highest, lowest).scatter_(1, at, key)
                yield self._flat(keys), part

        return Keyed(self.keyed.spec, chunks)

    def _counts(self, reduce: Reduce) -> tuple[int, Tensor]:
        """How many weights are zero, and how many go with each rank and those below it; zeros go with all."""
        size = self.grouping.of
        held = torch.zeros(size + 1, dtype=torch.int64)
        for keys, _ in self.keyed.chunks():
            zeros = (self._rows(keys) == self.space.lowest).sum(1)
            held += torch.bincount(zeros, minlength=size + 1).cpu()
        held = reduce(held)
        ranks = torch.arange(1, size + 1)
        zeros = torch.arange(size + 1) * held
        beyond = zeros.sum() - zeros.cumsum(0)[1:]  # in rows with more zeros than the ranks so far
        return int(zeros.sum()), ranks * held.cumsum(0)[1:] + beyond

    def _at(self, level: int) -> Iterator[tuple[Tensor, Part]]:
        """Keys of the elements of one rank, but for zeros, with their flat indices."""
        for rows, part, key, at in self._with_rank(level):
            index = self._flat(torch.zeros_like(rows, dtype=torch.bool).scatter_(1, at, key != self.space.lowest))
            found = index.nonzero().reshape(-1)
            start = found + part.start if isinstance(part.start, int) else part.start.reshape(-1)[found]
            keys = self._flat(rows)[found]
            yield keys, Part(self.keyed.spec, keys, start)

    def _with_rank(self, level: int) -> Iterator[tuple[Tensor, Part, Tensor, Tensor]]:
        """(rows of keys, part, and of each row the key and the place of the element of one rank) of every chunk."""
        held = iter(list(self._found.get(level, [])))
        found = []
        for keys, part in self.keyed.chunks():
            if not keys.numel():
                continue
            rows = self._rows(keys)
            one = next(held, None) or at_rank(rows, level)
            found.append(one)
            yield rows, part, *one
        self._found = {level: found}

    def _rows(self, keys: Tensor) -> Tensor:
        """Flat keys as (rows, elements of a row)."""
        g = self.grouping
        return keys.view(-1, g.of) if g.inner == 1 else keys.view(-1, g.of, g.inner).mT.reshape(-1, g.of)

    def _flat(self, rows: Tensor) -> Tensor:
        """The inverse of `_rows`."""
        g = self.grouping
        return rows.view(-1) if g.inner == 1 else rows.view(-1, g.inner, g.of).mT.reshape(-1)


def at_rank(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The key and the place of each row's element of a rank, of equal keys the one further left first; ``(rows, 1)`` both.

    >>> at_rank(torch.tensor([[5, 2, 5, 5], [1, 2, 3, 4]]), 2)
    (tensor([[5],
            [3]]), tensor([[2],
            [2]]))
    """
    if rows.is_cuda:  # where kthvalue is refused if algorithms must be deterministic
        key = rows.sort(dim=1).values[:, rank : rank + 1].contiguous()
        return key, _place(rows, key, rank)
    key, at = rows.kthvalue(rank + 1, dim=1, keepdim=True)
    tied = ((rows == key).sum(1) > 1).nonzero().reshape(-1)
    if len(tied):
        at[tied] = _place(rows[tied], key[tied], rank)
    return key, at


def _place(rows: Tensor, key: Tensor, rank: int) -> Tensor:
    """Where the element of a rank stands in each row, given its key: among the elements that have it, so far from the left."""
    equal = rows == key
    which = rank + 1 - (rows < key).sum(1, keepdim=True)
    return (equal & (equal.cumsum(1) == which)).to(torch.uint8).argmax(1, keepdim=True)
