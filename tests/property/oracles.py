"""Answers worked out another way: full sorts, brute force, exact fractions. Nothing here comes from the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Masks = dict[str, NDArray[np.bool_]]


def values(t: Tensor) -> NDArray[np.float64]:
    """The flat values in float64, which holds every dtype exactly."""
    return t.detach().to(torch.float64).reshape(-1).numpy()


def smallest(
    tensors: Mapping[str, Tensor], count: int, scores: Mapping[str, NDArray[np.float64]] | None = None
) -> Masks:
    """What goes, flat, of each tensor: zeros, and the ``count`` first of a full sort by (zero first, score, name, index)."""
    names = sorted(tensors)
    w = np.concatenate([values(tensors[n]) for n in names])
    score = np.abs(w) if scores is None else np.concatenate([scores[n] for n in names])
    rank = np.repeat(np.arange(len(names)), [tensors[n].numel() for n in names])
    index = np.concatenate([np.arange(tensors[n].numel()) for n in names])
    order = np.lexsort((index, rank, score + 0.0, w != 0))
    gone = w == 0
    gone[order[:count]] = True
    ends = np.cumsum([tensors[n].numel() for n in names])[:-1]
    return dict(zip(names, np.split(gone, ends), strict=True))


def smallest_survivor(t: Tensor, gone: NDArray[np.bool_]) -> float | None:
    """The smallest magnitude that survives, zeros apart."""
    left = np.abs(values(t))[~gone & (values(t) != 0)]
    return float(left.min()) if left.size else None


def groups(shape: Sequence[int], dim: int, of: int) -> list[list[int]]:
    """The flat indices of each group of ``of`` neighbours along a dim."""
    strides = np.cumprod([1, *reversed(shape)])[::-1][1:]
    out = []
    for at in product(*(range(0, s, of if d == dim else 1) for d, s in enumerate(shape))):
        first = int(np.dot(at, strides))
        out.append([first + int(strides[dim]) * i for i in range(of)])
    return out


def nm(t: Tensor, dim: int, keep: int, of: int) -> NDArray[np.bool_]:
    """What goes, flat, under N:M: the ``of - keep`` smallest of each group, earlier first, and zeros."""
    w = np.abs(values(t))
    gone = w == 0
    for group in groups(t.shape, dim, of):
        for i in sorted(group, key=lambda i: (w[i], i))[: of - keep]:
            gone[i] = True
    return gone


def nm_ranks(t: Tensor, dim: int, of: int) -> NDArray[np.int64]:
    """The rank of each element inside its group, smallest first, earlier first among equals."""
    w, ranks = np.abs(values(t)), np.zeros(t.numel(), dtype=np.int64)
    for group in groups(t.shape, dim, of):
        for rank, i in enumerate(sorted(group, key=lambda i: (w[i], i))):
            ranks[i] = rank
    return ranks


def nm_partial(tensors: Mapping[str, Tensor], dim: int, of: int, count: int) -> Masks:
    """What goes on the way to N:M: a full sort by (zero first, rank in the group, magnitude, name, index)."""
    names = sorted(tensors)
    w = np.concatenate([np.abs(values(tensors[n])) for n in names])
    in_group = np.concatenate([nm_ranks(tensors[n], dim, of) for n in names])
    sizes = [tensors[n].numel() for n in names]
    rank = np.repeat(np.arange(len(names)), sizes)
    index = np.concatenate([np.arange(s) for s in sizes])
    order = np.lexsort((index, rank, w, in_group, w != 0))
    gone = w == 0
    gone[order[:count]] = True
    return dict(zip(names, np.split(gone, np.cumsum(sizes)[:-1]), strict=True))


Units = list[tuple[str, list[int]]]
"""The units of some tensors, in order: name of the tensor, flat indices."""


def units(name: str, shape: Sequence[int], edges: Sequence[int]) -> Units:
    """Blocks with the given edge along each dim, in row-major order of the blocks."""
    strides = np.cumprod([1, *reversed(shape)])[::-1][1:]
    out = []
    for corner in product(*(range(0, s, e) for s, e in zip(shape, edges, strict=True))):
        cells = product(*(range(c, c + e) for c, e in zip(corner, edges, strict=True)))
        out.append((name, sorted(int(np.dot(cell, strides)) for cell in cells)))
    return out


def unit_score(w: Sequence[Fraction], reduce: str) -> Fraction:
    """The score of a unit, exactly; l2 by its square, which has the same order."""
    if reduce == "max":
        return max(w)
    total = sum((x * x for x in w), Fraction(0)) if reduce == "l2" else sum(w, Fraction(0))
    return total / len(w) if reduce == "mean" else total


def smallest_units(
    tensors: Mapping[str, Tensor], listed: Units, count: int, reduce: str, high: Mapping[str, int] | None = None
) -> list[int]:
    """Which units go (positions in ``listed``): in order of (zero first, score, position) while their weights fit.

    With ``high`` a tensor is passed over from the unit on that would leave it with more zeros than that, single ones too.
    """
    exact = {n: [Fraction(float(v)) for v in np.abs(values(t))] for n, t in tensors.items()}
    scored = []
    for i, (name, cells) in enumerate(listed):
        w = [exact[name][c] for c in cells]
        scored.append((sum(map(bool, w)) > 0, unit_score(w, reduce), i))
    zeros = {n: w.count(Fraction(0)) for n, w in exact.items()}
    full: set[str] = set()
    out, used = [], 0
    for live, _, i in sorted(scored):
        name, cells = listed[i]
        more = sum(bool(exact[name][c]) for c in cells)
        if high is not None and live and zeros[name] + more > high[name]:
            full.add(name)
        if live and name in full:
            continue
        if live and used + len(cells) > count:
            break
        used += len(cells)
        zeros[name] += more
        out.append(i)
    return out


def held_back(tensors: Mapping[str, Tensor], listed: Units, count: int, reduce: str, high: Mapping[str, int]) -> bool:
    """Whether caps alone keep units from going: those that may go all do, and the next of the others would fit."""
    every = smallest_units(tensors, listed, 1 << 62, reduce)
    may = smallest_units(tensors, listed, 1 << 62, reduce, high)
    others = [len(listed[i][1]) for i in every if i not in set(may)]
    return bool(others) and sum(len(listed[i][1]) for i in may) + others[0] <= count


def capped(tensors: Mapping[str, Tensor], count: int, high: Mapping[str, int]) -> Masks:
    """Walks all weights in order (zero first, magnitude, name, index), passing over tensors that are full."""
    cells = [
        (bool(v), float(v), name, i) for name, t in sorted(tensors.items()) for i, v in enumerate(np.abs(values(t)))
    ]
    gone = {n: values(t) == 0 for n, t in tensors.items()}
    lost = {n: int(g.sum()) for n, g in gone.items()}
    left = count - sum(lost.values())
    for live, _, name, i in sorted(cells):
        if live and left > 0 and lost[name] < max(high[name], int((values(tensors[name]) == 0).sum())):
            gone[name][i] = True
            lost[name] += 1
            left -= 1
    return gone


def lamp_scores(t: Tensor) -> list[Fraction]:
    """LAMP by its formula: ``w_u**2 / sum of w_v**2 over all v with |w_v| >= |w_u|``, O(n**2)."""
    w = [Fraction(float(v)) for v in np.abs(values(t))]
    return [u * u / sum(v * v for v in w if v >= u) if u else Fraction(0) for u in w]


def lamp_counts(tensors: Mapping[str, Tensor], count: int, high: Mapping[str, int] | None = None) -> dict[str, int]:
    """How many each tensor loses when weights go in order of (zero first, LAMP, name); full tensors are passed over."""
    order = sorted((score, name) for name, t in tensors.items() for score in lamp_scores(t) if score)
    lost = {n: int((values(t) == 0).sum()) for n, t in tensors.items()}
    left = count - sum(lost.values())
    for _, name in order:
        if left > 0 and (high is None or lost[name] < high[name]):
            lost[name] += 1
            left -= 1
    return lost


def erk_densities(shapes: Mapping[str, Sequence[int]], density: Fraction, kernel: bool = True) -> dict[str, Fraction]:
    """ERK (or ER) as the RigL paper describes it: one epsilon, layers that would exceed 1 made dense, and again."""
    size = {n: int(np.prod(s)) for n, s in shapes.items()}

    def raw(name: str) -> Fraction:
        shape = shapes[name]
        if kernel:
            return Fraction(sum(shape), size[name])
        return Fraction(shape[0] + shape[1], shape[0] * shape[1])

    budget = density * sum(size.values())
    dense: set[str] = set()
    while True:
        sparse = [n for n in shapes if n not in dense]
        if not sparse:
            return dict.fromkeys(shapes, Fraction(1))
        eps = (budget - sum(size[n] for n in dense)) / sum(raw(n) * size[n] for n in sparse)
        over = [n for n in sparse if eps * raw(n) > 1]
        if not over:
            return {n: Fraction(1) if n in dense else eps * raw(n) for n in shapes}
        dense.update(over)


def level_counts(
    slopes: Sequence[int], low: Sequence[int], high: Sequence[int], total: int, later_first: bool = False
) -> list[int]:
    """One weight after another: always the tensor whose next step lies at the lowest level ``(k - 1/2) / slope``.

    Steps below ``low`` are taken beforehand, none is taken beyond ``high``.
    """
    at = list(low)
    for _ in range(total - sum(low)):
        steps = [
            (Fraction(2 * at[i] + 1, 2 * slopes[i]), -i if later_first else i)
            for i in range(len(slopes))
            if at[i] < high[i] and slopes[i] > 0
        ]
        at[abs(min(steps)[1])] += 1
    return at
