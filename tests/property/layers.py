"""Drawn layers with correlated inputs, and what solvers must give, worked out another way: explicit inverses, brute force,
least squares on the inputs themselves. Nothing here comes from the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drawn:
    """A layer: inputs (n, in), their Hessian ``2/n sum(x x^T)``, weights (out, in), all float64."""

    x: Tensor
    hessian: Tensor
    weight: Tensor


def draw(rows: int, inputs: int, seed: int, *, samples: int | None = None) -> Drawn:
    """Inputs that share directions and differ in size by up to twenty times, and normal weights."""
    g = torch.Generator().manual_seed(seed)
    n = samples or 4 * inputs
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64) / inputs**0.5 + torch.eye(
        inputs, dtype=torch.float64
    )
    sizes = 0.1 + 2 * torch.rand(inputs, generator=g, dtype=torch.float64)
    x = (torch.randn(n, inputs, generator=g, dtype=torch.float64) @ mix) * sizes
    w = torch.randn(rows, inputs, generator=g, dtype=torch.float64)
    return Drawn(x, hessian_of(x), w)


def hessian_of(x: Tensor) -> Tensor:
    return 2 / len(x) * (x.T @ x)


def damped(h: Tensor, share: float) -> Tensor:
    """With a share of the mean diagonal added to it."""
    return h + share * float(h.diagonal().mean()) * torch.eye(len(h), dtype=h.dtype)


def error(x: Tensor, before: Tensor, after: Tensor) -> float:
    """The squared error of the outputs, a sample."""
    return float((x @ (after.double() - before.double()).T).square().sum()) / len(x)


def fitted(x: Tensor, row: Tensor, keep: Sequence[int]) -> Tensor:
    """One row whose kept weights give its outputs back as well as they can, by least squares on the inputs."""
    out = torch.zeros_like(row)
    some = list(keep)
    if some:
        out[some] = torch.linalg.lstsq(x[:, some], (x @ row)[:, None], driver="gelsd").solution[:, 0]
    return out


def without(inputs: int, gone: Sequence[int]) -> list[int]:
    return [j for j in range(inputs) if j not in set(gone)]


def greedy(x: Tensor, row: Tensor, steps: int) -> list[int]:
    """Which weights a row loses, one after another, each time the one whose loss least squares mends best."""
    gone: list[int] = []
    for _ in range(steps):
        left = without(len(row), gone)
        costs = [error(x, row[None], fitted(x, row, without(len(row), [*gone, j]))[None]) for j in left]
        gone.append(left[min(range(len(left)), key=costs.__getitem__)])
    return gone


def stable_first(score: Tensor, zero: Tensor, count: int) -> Tensor:
    """The ``count`` first of a full stable sort by (zero first, score, flat index); bool."""
    order = torch.where(zero, -1.0, score).reshape(-1).argsort(stable=True)[:count]
    gone = torch.zeros(score.numel(), dtype=torch.bool)
    gone[order] = True
    return gone.view(score.shape)


def sparsegpt(w: Tensor, h: Tensor, counts: Sequence[int] | None, width: int, group: tuple[int, int] | None) -> Tensor:
    """SparseGPT by what it means: each column's loss is mended by the columns to its right alone, with the inverse of the
    Hessian of those that are left, ``G = (H[j:, j:])^-1``, worked out anew for every column.

    Args:
        w, h: weights and damped Hessian, float64.
        counts: how many go of each block of ``width`` columns; or ``None`` and
        group: (M, how many of each M go).
    """
    w, zero, inputs = w.clone(), w == 0, len(h)
    gone = torch.zeros_like(zero)
    left = [torch.linalg.inv(h[j:, j:]) for j in range(inputs)]
    pivots = torch.stack([g[0, 0] for g in left])
    for j in range(inputs):
        if counts is not None and j % width == 0:
            some = slice(j, j + width)
            gone[:, some] = stable_first(w[:, some].square() / pivots[some], zero[:, some], counts[j // width])
        elif group is not None and j % group[0] == 0:
            some = slice(j, j + group[0])
            score = torch.where(zero[:, some], -1.0, w[:, some].square() / pivots[some])
            ranks = score.argsort(dim=1, stable=True).argsort(dim=1)
            gone[:, some] = (ranks < group[1]) | zero[:, some]
        lost = w[:, j] * gone[:, j]
        w[:, j:] -= lost[:, None] / pivots[j] * left[j][0]
    return w.masked_fill(gone, 0.0)


def wanda(w: Tensor, x: Tensor, count: int) -> Tensor:
    """Wanda: of each row the ``count`` lowest of ``|w| times the norm of the input`` set to zero."""
    score = w.abs() * x.square().sum(0).sqrt()
    return torch.stack([r.masked_fill(stable_first(s, r == 0, count), 0.0) for r, s in zip(w, score, strict=True)])


def grouped(w: Tensor, score: Tensor, of: int, go: int) -> Tensor:
    """Of every ``of`` neighbours of a row the ``go`` lowest set to zero."""
    ranks = score.view(-1, of).argsort(dim=1, stable=True).argsort(dim=1).view(w.shape)
    return w.masked_fill(ranks < go, 0.0)
