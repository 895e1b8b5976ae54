"""N:M and rows: in every group of M weights along the input dimension, N survive; a row is a group as long as the row.

The key is ``(zero first, rank inside the group, score, tensor rank, flat index)``, where rank 0 is the smallest of a group
and the lower position comes first among equals. At the full count every rank below M - N goes, so each group keeps exactly
N. At a smaller one (a schedule on its way) whole ranks go first, then the smallest keys of the next rank: no group loses
more than M - N, and the mask contains the final one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .patterns import Grouping
from .select import Cut, Keyed, Space, smallest
from .types import Part, Reduce, Spec


def group_ranks(keys: Tensor, grouping: Grouping) -> Tensor:
    """Rank (int64, same shape) of each element inside its group, from flat keys of whole runs of groups."""
    if not keys.numel():
        return keys
    seen = keys.view(-1, grouping.of, grouping.inner)
    order = torch.sort(seen, dim=1, stable=True).indices
    ranks = torch.empty_like(order)
    positions = torch.arange(grouping.of, device=keys.device).view(1, -1, 1).expand_as(order)
    return ranks.scatter_(1, order, positions).view(-1)


class Ranked:
    """A tensor with its keys and, of each element, the rank in its group.

    Args:
        keyed: chunks of whole runs of groups.
        grouping: the tensor's groups.
    """

    def __init__(self, keyed: Keyed, grouping: Grouping) -> None:
        self.keyed, self.grouping = keyed, grouping

    @property
    def spec(self) -> Spec:
        """The tensor."""
        return self.keyed.spec

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Part]]:
        """(keys, ranks, part) of every chunk."""
        for keys, part in self.keyed.chunks():
            yield keys, group_ranks(keys, self.grouping), part


def full_cut(grouping: Grouping, space: Space) -> Cut:
    """The cut at the full count: every rank that may go."""
    return Cut(space.lowest + 1, 0, grouping.most)


def levelled(ranked: Ranked, level: int, space: Space) -> Keyed:
    """The same tensor with keys for one level: lower ranks get the lowest key, higher ranks the highest."""
    highest = space.lowest + (1 << space.bits) - 1

    def chunks() -> Iterator[tuple[Tensor, Part]]:
        for keys, ranks, part in ranked.chunks():
            later = (ranks > level) & (keys != space.lowest)
            yield keys.masked_fill(ranks < level, space.lowest).masked_fill_(later, highest), part

    return Keyed(ranked.spec, chunks)


def partial_cuts(tensors: Sequence[Ranked], most: int, count: int, space: Space, reduce: Reduce) -> list[Cut]:
    """The cuts that prune exactly ``count`` weights of all tensors, no group losing more than ``most``.

    Args:
        tensors: with the keys of their scores, in rank order, chunks holding whole groups.
        most: ranks that may go.
        count: at most as many as lie in these ranks.
    """
    at = torch.zeros(most + 1, dtype=torch.int64)
    for t in tensors:
        for keys, ranks, _ in t.chunks():
            seen = ranks.masked_fill(keys == space.lowest, 0).clamp_(max=most)
            at += torch.bincount(seen, minlength=most + 1).cpu()
    upto = reduce(at)[:most].cumsum(0)
    level = min(int(torch.searchsorted(upto, count)), most - 1)
    cuts = smallest([levelled(t, level, space) for t in tensors], count, space, reduce)
    return [Cut(c.key, c.index, level) for c in cuts]
