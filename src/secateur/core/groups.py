"""N:M: in every group of M weights along the input dimension, N survive.

The key is ``(zero first, rank inside the group, score, tensor rank, flat index)``, where rank 0 is the smallest of a group
and the lower position comes first among equals. At the full count every rank below M - N goes, so each group keeps exactly
N. At a smaller one (a schedule on its way) whole ranks go first, then the smallest keys of the next rank: no group loses
more than M - N, and the mask contains the final one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .patterns import NM
from .select import Cut, Keyed, Space, smallest
from .types import Part, Reduce, Spec


def group_ranks(keys: Tensor, spec: Spec, pattern: NM) -> Tensor:
    """Rank (int64, same shape) of each element inside its group, from flat keys of whole runs of groups."""
    _, _, inner = pattern.layout(spec)
    if not keys.numel():
        return keys
    seen = keys.view(-1, pattern.of, inner)
    order = torch.sort(seen, dim=1, stable=True).indices
    ranks = torch.empty_like(order)
    positions = torch.arange(pattern.of, device=keys.device).view(1, -1, 1).expand_as(order)
    return ranks.scatter_(1, order, positions).view(-1)


def block_of(spec: Spec, pattern: NM) -> int:
    """Length of the contiguous run that holds whole groups."""
    return max(1, pattern.of * pattern.layout(spec)[2])


def full_cut(pattern: NM, space: Space) -> Cut:
    """The cut at the full count: every rank below M - N."""
    return Cut(space.lowest + 1, 0, pattern.of - pattern.keep)


def levelled(keyed: Keyed, pattern: NM, level: int, space: Space) -> Keyed:
    """The same tensor with keys for one level: lower ranks get the lowest key, higher ranks the highest."""
    highest = space.lowest + (1 << space.bits) - 1

    def chunks() -> Iterator[tuple[Tensor, Part]]:
        for keys, part in keyed.chunks():
            ranks = group_ranks(keys, keyed.spec, pattern)
            later = (ranks > level) & (keys != space.lowest)
            yield keys.masked_fill(ranks < level, space.lowest).masked_fill_(later, highest), part

    return Keyed(keyed.spec, chunks)


def partial_cuts(tensors: Sequence[Keyed], pattern: NM, count: int, space: Space, reduce: Reduce) -> list[Cut]:
    """The cuts that prune exactly ``count`` weights of all tensors on the way to the full pattern.

    Args:
        tensors: with the keys of their scores, in rank order, chunks holding whole groups.
        count: at most (M - N) / M of all elements.
    """
    most = pattern.of - pattern.keep
    at = torch.zeros(most + 1, dtype=torch.int64)
    for t in tensors:
        for keys, _ in t.chunks():
            ranks = group_ranks(keys, t.spec, pattern).masked_fill_(keys == space.lowest, 0).clamp_(max=most)
            at += torch.bincount(ranks, minlength=most + 1).cpu()
    upto = reduce(at)[:most].cumsum(0)
    level = min(int(torch.searchsorted(upto, count)), most - 1)
    cuts = smallest([levelled(t, pattern, level, space) for t in tensors], count, space, reduce)
    return [Cut(c.key, c.index, level) for c in cuts]
