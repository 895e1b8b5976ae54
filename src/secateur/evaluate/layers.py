"""A layer as solvers see it: one matrix of outputs by inputs for each group of its convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.core.allocate import Bounds, level_counts
from secateur.core.bits import zero_
from secateur.core.keys import nonzero
from secateur.core.patterns import NM, Pattern
from secateur.core.solve.asked import AnySolver, asked
from secateur.core.types import Spec


class Solved(NamedTuple):
    """A layer's new weight in its own shape, which weights stay, and what the solver accounts for."""

    weight: Tensor
    mask: Tensor
    loss: float
    damping: float


def solve_layer(
    solver: AnySolver, spec: Spec, weight: Tensor, measured: Mapping[str, Tensor], pattern: Pattern, count: int,
    mask: Tensor | None,
) -> Solved:  # fmt: skip
    """Solves one layer; the weight is read, not written.

    Args:
        solver: see `secateur.core.solve.asked`.
        spec, weight: the tensor.
        measured: its statistics.
        pattern, count: what is to go, for a solver that chooses itself.
        mask: what stays, for one that does not.
    """
    given: dict[str, Any] = {"pattern": pattern, "count": count, "mask": mask, "name": spec.name}
    wants = asked(solver)
    if "hessian" not in wants:
        given["fisher_inverse"] = measured["fisher_inverse"]
        return Solved(*solver(weight, **{k: v for k, v in given.items() if k in wants}))
    rows, order = _rows(spec, weight, pattern)
    kept = None if mask is None else _rows(spec, mask, pattern)[0]
    hessians = measured["hessian"].reshape(len(rows), rows.shape[2], -1)
    if order is not None:
        hessians = hessians[:, order][:, :, order]
    found = []
    for i, n in enumerate(_shares(rows, pattern, count)):
        own = given | {"hessian": hessians[i].to(weight.device), "count": n, "mask": None if kept is None else kept[i]}
        found.append(solver(rows[i], **{k: v for k, v in own.items() if k in wants}))
    new, stay = (_back(spec, torch.stack([f[i] for f in found]), order) for i in (0, 1))
    return Solved(new, stay, sum(f.loss for f in found), max(f.damping for f in found))


def write_layer(weight: Tensor, solved: Solved) -> None:
    """Writes a solved layer in place, with +0.0 where weights go."""
    weight.copy_(solved.weight)
    zero_(weight, ~solved.mask)


def _rows(spec: Spec, weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor | None]:
    """The weight as ``(groups, outputs, features)``, and the order of the features if it is not that of their inputs' sums.

    N:M groups run over input channels at one kernel position, so there the positions come first.
    """
    if spec.role == "linear_transposed":
        return weight.T.unsqueeze(0), None
    if spec.role != "conv":
        return weight.unsqueeze(0), None
    order = None
    kernel = weight[0, 0].numel() if weight.numel() else 1
    if isinstance(pattern, NM) and kernel > 1:
        order = torch.arange(weight.shape[1] * kernel, device=weight.device).view(weight.shape[1], kernel).T.reshape(-1)
    flat = weight.reshape(spec.groups, len(weight) // spec.groups, -1)
    return (flat if order is None else flat[:, :, order]), order


def _back(spec: Spec, rows: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `_rows`."""
    if spec.role == "linear_transposed":
        return rows[0].T
    if order is not None:
        rows = rows[:, :, torch.argsort(order)]
    return rows.reshape(spec.shape)


def _shares(rows: Tensor, pattern: Pattern, count: int) -> Sequence[int]:
    """How many of each group of a convolution go."""
    size = rows[0].numel()
    if len(rows) == 1 or isinstance(pattern, NM):
        return [count // len(rows)] * len(rows)
    zeros = [int((~nonzero(r)).sum()) for r in rows]
    return level_counts([size] * len(rows), [Bounds(z, size) for z in zeros], count)
