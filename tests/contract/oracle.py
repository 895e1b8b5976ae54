"""What the masks must be, by full sorts in NumPy: slow, short, and written from the design, not from the code.

Nothing of `secateur.core` is used but the user's view of it: a criterion is a function that gives scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import secateur
from secateur.core.spelling import criterion_of

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FEATURES = {"conv.weight": (0, 1), "fc1.weight": (0, 1), "fc2.weight": (0, 1)}
"""(output dim, input dim) of each prunable weight of the test network."""


def count(n: int, sparsity: float) -> int:
    """``n * s`` rounded half to even, by decimal arithmetic."""
    return int((Decimal(n) * Decimal(str(sparsity))).quantize(Decimal(1), ROUND_HALF_EVEN))


def wide(t: Tensor) -> Floats:
    """Values as fp64; exact for every dtype."""
    return t.detach().to(torch.float64).numpy()


def bad(t: Tensor) -> Bools:
    """NaN and infinities, also of the formats without infinities."""
    return ~np.isfinite(wide(t))


def scores(criterion: Any, name: str, t: Tensor, nonfinite: str) -> Floats:
    """A tensor's scores: minus infinity for what goes first (zeros), infinity for what stays whatever is asked."""
    if criterion == "magnitude":
        s = np.abs(wide(t))
    else:
        index = torch.arange(t.numel()).view(t.shape)
        function = criterion_of(criterion)
        offered = {"name": name, "index": index} if function is not _elementwise() else {}
        s = wide(function(t.clone(), **offered))
    s = np.where(wide(t) == 0, -np.inf, s)
    return np.where(bad(t), {"keep": np.inf, "prune": -np.inf, "error": np.nan}[nonfinite], s)


def _elementwise() -> Any:
    from tests.contract.table import signed

    return signed


def smallest(pool: Mapping[str, Floats], k: int) -> dict[str, Bools]:
    """Where the ``k`` first in the order (score, name, flat index) lie, and whatever has minus infinity."""
    names = sorted(pool)
    flat = np.concatenate([pool[n].ravel() for n in names])
    gone = flat == -np.inf
    gone[np.argsort(flat, kind="stable")[:k]] = True
    cuts = np.cumsum([pool[n].size for n in names])[:-1]
    return {n: g.reshape(pool[n].shape) for n, g in zip(names, np.split(gone, cuts), strict=True)}


def groups_of_four(s: Floats, in_dim: int, prune: int = 2) -> Bools:
    """Where the ``prune`` first of every four along the input dim lie, and whatever has minus infinity."""
    moved = np.moveaxis(s, in_dim, -1)
    quads = moved.reshape(-1, 4)
    gone = quads == -np.inf
    first = np.argsort(quads, axis=1, kind="stable")[:, :prune]
    np.put_along_axis(gone, first, True, axis=1)
    return np.moveaxis(gone.reshape(moved.shape), -1, in_dim)


def rows(s: Floats, out_dim: int, k: int) -> Bools:
    """Where the ``k`` first lie, rank by rank inside the rows, and whatever has minus infinity."""
    flat = np.moveaxis(s, out_dim, 0).reshape(s.shape[out_dim], -1)
    ranks = np.argsort(np.argsort(flat, axis=1, kind="stable"), axis=1, kind="stable")
    ranks[flat == -np.inf] = -1
    whole = np.moveaxis(ranks.reshape(np.moveaxis(s, out_dim, 0).shape), 0, out_dim)
    gone = np.ascontiguousarray(s == -np.inf)
    gone.reshape(-1)[np.lexsort((np.arange(s.size), s.ravel(), whole.ravel()))[:k]] = True
    return gone


def unit_ids(pattern: Any, shape: tuple[int, ...], dims: tuple[int, int]) -> NDArray[np.int64]:
    """Which unit each element belongs to, numbered row-major."""
    grid = np.indices(shape)
    if isinstance(pattern, secateur.Channel):
        return grid[dims[0] if pattern.side == "out" else dims[1]]
    steps = [1] * len(shape)
    steps[dims[0]], steps[dims[1]] = pattern.shape
    blocks = [g // s for g, s in zip(grid, steps, strict=True)]
    return np.ravel_multi_index(blocks, tuple(n // s for n, s in zip(shape, steps, strict=True)))


def unit_scores(
    criterion: Any, name: str, t: Tensor, ids: NDArray[np.int64], reduce: str, nonfinite: str
) -> tuple[Floats, int]:
    """(the score of every unit, minus infinity if nothing in it lives; weights in a unit)."""
    units = int(ids.max()) + 1
    size = t.numel() // units
    s = scores(criterion, name, t, nonfinite)
    live, kept = s != -np.inf, s == np.inf
    if isinstance(criterion_of(criterion), type(secateur.random(0))):
        numbers = torch.arange(units)
        out = wide(criterion_of(criterion)(numbers, name=name, index=numbers))
    else:
        each = np.where(live & ~kept, s, -np.inf if reduce == "max" else 0.0)
        table = np.zeros(units)
        if reduce == "max":
            table[:] = -np.inf
            np.maximum.at(table, ids, each)
        else:
            np.add.at(table, ids, each**2 if reduce == "l2" else each)
        out = {"mean": table / size, "l2": np.sqrt(np.abs(table)), "l1": table, "max": table}[reduce]
    out = np.where(np.bincount(ids[kept], minlength=units) > 0, np.inf, out)
    return np.where(np.bincount(ids[live], minlength=units) == 0, -np.inf, out), size


def units_gone(pattern: Any, criterion: Any, pool: Mapping[str, Tensor], k: int, nonfinite: str = "error",
               reduce: str | None = None) -> dict[str, Bools]:  # fmt: skip
    """Where whole units lie: as many, in order, as together have at most ``k`` weights, and those that are dead."""
    reduce = reduce or ("l2" if len(pool) == 1 and criterion_of(criterion) is secateur.magnitude else "mean")
    tables, sizes, ids = {}, {}, {}
    for name, t in pool.items():
        ids[name] = unit_ids(pattern, tuple(t.shape), FEATURES[name])
        tables[name], sizes[name] = unit_scores(criterion, name, t, ids[name], reduce, nonfinite)
    names = sorted(pool)
    flat = np.concatenate([tables[n] for n in names])
    each = np.concatenate([np.full(len(tables[n]), sizes[n]) for n in names])
    order = np.argsort(flat, kind="stable")
    fits = int((np.cumsum(each[order]) <= k).sum())
    gone = flat == -np.inf
    gone[order[:fits]] = True
    cuts = np.cumsum([len(tables[n]) for n in names])[:-1]
    return {n: g[ids[n]] for n, g in zip(names, np.split(gone, cuts), strict=True)}


def gone(
    pattern: Any, criterion: Any, pool: Mapping[str, Tensor], k: int, nonfinite: str = "error",
    reduce: str | None = None,
) -> dict[str, Bools]:  # fmt: skip
    """Everything that is zero after ``k`` weights of a pool of tensors were asked for, zeros of before included."""
    if isinstance(pattern, secateur.Block | secateur.Channel):
        found = units_gone(pattern, criterion, pool, k, nonfinite, reduce)
        dead = {n: (wide(t) == 0) | (bad(t) & (nonfinite == "prune")) for n, t in pool.items()}
        return {n: g | dead[n] for n, g in found.items()}
    own = {n: scores(criterion, n, t, nonfinite) for n, t in pool.items()}
    if isinstance(pattern, secateur.NM):
        return {n: groups_of_four(s, FEATURES[n][1]) for n, s in own.items()}
    if isinstance(pattern, secateur.Row):
        return {n: rows(s, FEATURES[n][0], k) for n, s in own.items()}
    return smallest(own, k)


def lamp_counts(pool: Mapping[str, Tensor], k: int) -> dict[str, int]:
    """LAMP by its formula, equal magnitudes sharing a score: how many of each tensor are among the ``k`` smallest."""
    table = {}
    for name, t in pool.items():
        squares = np.sort(wide(t).ravel() ** 2)
        suffix = np.cumsum(squares[::-1])[::-1]
        first = np.searchsorted(squares, squares, side="left")
        with np.errstate(invalid="ignore"):
            table[name] = np.where(squares == 0, -np.inf, squares / suffix[first])
    return {n: int(g.sum()) for n, g in smallest(table, k).items()}
