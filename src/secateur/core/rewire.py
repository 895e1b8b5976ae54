"""Sparse training: which weights of a tensor live next, where as many come as go."""

from __future__ import annotations

import torch
from torch import Tensor

from .elements import SCORES, pruned_by
from .keys import CHUNK
from .select import Keyed, smallest
from .types import Part, Spec


def lowest(spec: Spec, keys: Tensor, among: Tensor, count: int) -> Tensor:
    """Where the ``count`` lowest of some keys are; of equal keys those at the lower flat index.

    Args:
        spec: the tensor.
        keys: int64, one an element, flat; above `secateur.core.keys.LOWEST`.
        among: bool, flat: the elements to take from.
        count: 0 <= count <= how many those are.

    Returns:
        bool, flat.

    >>> w = Spec("w", (4,), torch.float32, "linear")
    >>> lowest(w, torch.tensor([0, 3, 1, 1]), torch.tensor([False, True, True, True]), 1).tolist()
    [False, False, True, False]
    """
    pieces = []
    for at in range(0, among.numel(), CHUNK):
        index = at + among[at : at + CHUNK].nonzero().reshape(-1)
        some = keys[index]
        pieces.append((some, Part(spec, some, index)))
    (cut,) = smallest([Keyed(spec, lambda: iter(pieces))], count, SCORES)
    found = torch.zeros_like(among)
    for some, part in pieces:
        found[part.index()[pruned_by(some, part, cut, SCORES.lowest)]] = True
    return found


def rewire(spec: Spec, live: Tensor, drop: Tensor, grow: Tensor, count: int) -> Tensor:
    """The mask after ``count`` live weights go and ``count`` come from all that do not live then, the dropped included.

    Args:
        spec: the tensor.
        live: bool, flat.
        drop, grow: int64 keys, flat; the lowest go, and the lowest come.
        count: at most as many as live.

    Returns:
        bool, flat; as many are ``True`` as in ``live``.

    >>> w = Spec("w", (4,), torch.float32, "linear")
    >>> live, magnitudes, gradients = torch.tensor([[1, 1, 0, 0], [5, 2, 0, 0], [0, 1, 9, 3]])
    >>> rewire(w, live.bool(), magnitudes, -gradients, 1).tolist()
    [True, False, True, False]
    """
    rest = live & ~lowest(spec, drop, live, count)
    return rest | lowest(spec, grow, ~rest, count)
