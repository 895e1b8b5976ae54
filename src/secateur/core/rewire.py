"""Sparse training: which weights of a tensor live next, where as many come as go."""

from __future__ import annotations

import torch
from torch import Tensor

from .elements import pruned_by
from .keys import CHUNK
from .select import Keyed, Space, smallest
from .types import Part, Spec


def lowest(spec: Spec, keys: Tensor, among: Tensor, count: int) -> Tensor:
    """Where the ``count`` lowest of some keys are; of equal keys those at the lower flat index.

    Args:
        spec: the tensor.
        keys: int64, 1 or more, one an element, flat; the smaller their range, the fewer passes.
        among: bool, flat: the elements to take from.
        count: 0 <= count <= how many those are.

    Returns:
        bool, flat.

    >>> w = Spec("w", (4,), torch.float32, "linear")
    >>> lowest(w, torch.tensor([1, 4, 2, 2]), torch.tensor([False, True, True, True]), 1).tolist()
    [False, False, True, False]
    """
    pieces = []
    for at in range(0, among.numel(), CHUNK):
        index = at + among[at : at + CHUNK].nonzero().reshape(-1)
        some = keys[index]
        pieces.append((some, Part(spec, some, index)))
    space = Space(int(keys.max()).bit_length())
    (cut,) = smallest([Keyed(spec, lambda: iter(pieces))], count, space)
    found = torch.zeros_like(among)
    for some, part in pieces:
        found[part.index()[pruned_by(some, part, cut, space.lowest)]] = True
    return found


def rewire(spec: Spec, live: Tensor, drop: Tensor, grow: Tensor, count: int) -> Tensor:
    """The mask after ``count`` live weights go and ``count`` come from all that do not live then, the dropped included.

    Args:
        spec: the tensor.
        live: bool, flat.
        drop, grow: keys as in `lowest`; the lowest go, and the lowest come.
        count: at most as many as live.

    Returns:
        bool, flat; as many are ``True`` as in ``live``.

    >>> w = Spec("w", (4,), torch.float32, "linear")
    >>> live, magnitudes, gradients = torch.tensor([[1, 1, 0, 0], [5, 2, 0, 0], [0, 1, 9, 3]])
    >>> rewire(w, live.bool(), 1 + magnitudes, 10 - gradients, 1).tolist()
    [True, False, True, False]
    """
    rest = live & ~lowest(spec, drop, live, count)
    return rest | lowest(spec, grow, ~rest, count)
