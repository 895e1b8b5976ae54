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
from secateur.core.solve.asked import AnySolver, asked, solver_name
from secateur.core.types import Spec
from secateur.errors import BadTensor


class Solved(NamedTuple):
    """A layer's new weight in its own shape, which weights stay, and what the solver accounts for, if it does."""

    weight: Tensor
    mask: Tensor
    loss: float | None = None
    damping: float | None = None


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

    Raises:
        BadTensor: the solver returned something else than it should.
    """
    given: dict[str, Any] = {"pattern": pattern, "count": count, "mask": mask, "name": spec.name}
    if "hessian" not in asked(solver):
        return _solve(solver, spec, weight, given | {"fisher_inverse": measured["fisher_inverse"]})
    rows, order = _rows(spec, weight, pattern)
    kept = None if mask is None else _rows(spec, mask, pattern)[0]
    hessians = measured["hessian"].reshape(len(rows), rows.shape[2], -1)
    if order is not None:
        hessians = hessians[:, order][:, :, order]
    found = []
    for i, n in enumerate(_shares(rows, pattern, count)):
        own = given | {"hessian": hessians[i].to(weight.device), "count": n, "mask": None if kept is None else kept[i]}
        found.append(_solve(solver, spec, rows[i], own))
    new, stay = (_back(spec, torch.stack(each), order) for each in ([f.weight for f in found], [f.mask for f in found]))
    losses = [f.loss for f in found if f.loss is not None]
    dampings = [f.damping for f in found if f.damping is not None]
    return Solved(new, stay, sum(losses) if losses else None, max(dampings) if dampings else None)


def _solve(solver: AnySolver, spec: Spec, weight: Tensor, given: Mapping[str, Any]) -> Solved:
    """What a solver returns, if it is what it should be."""
    who, wants = f"the solver {solver_name(solver)}", asked(solver)
    with torch.autocast(weight.device.type, enabled=False):
        found = solver(weight, **{k: v for k, v in given.items() if k in wants})
    try:
        solved = Solved(*found)
    except TypeError:
        raise BadTensor(
            f"{who} must return (weight, mask) or (weight, mask, loss, damping); got a {type(found).__name__}."
        ) from None
    for what, t, kind in (("weight", solved.weight, "of real numbers"), ("mask", solved.mask, "of bool")):
        fits = isinstance(t, Tensor) and t.shape == weight.shape and (t.dtype == torch.bool) == (what == "mask")
        if not fits or t.is_complex():
            got = f"{t.dtype}, {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise BadTensor(
                f"{who} must return a {what} {kind} of the shape {tuple(weight.shape)} for {spec}; got {got}."
            )
    if bad := int((~torch.isfinite(solved.weight[solved.mask])).sum()):
        raise BadTensor(f"{who} returned {bad} NaN or infinite weights for {spec}.")
    _check_choice(who, solved.mask, spec, weight, given)
    return solved


def _check_choice(who: str, mask: Tensor, spec: Spec, weight: Tensor, given: Mapping[str, Any]) -> None:
    """Refuses a mask that is not the one that was given, or not of the count and groups that were asked for."""
    pattern, gone = given["pattern"], int((~mask).sum())
    if given["mask"] is not None:
        if not torch.equal(mask, given["mask"]):
            raise BadTensor(f"{who} returned another mask for {spec} than the one it was given.")
        return
    if bool((mask & ~nonzero(weight)).any()):
        raise BadTensor(f"{who} keeps weights of {spec} that are zero already: those go first, and count.")
    if isinstance(pattern, NM):
        if bool((mask.view(len(mask), -1, pattern.of).sum(2) > pattern.keep).any()):
            raise BadTensor(f"{who} keeps more than {pattern.keep} weights in a group of {pattern.of} of {spec}.")
    elif gone != given["count"]:
        raise BadTensor(f"{who} prunes {gone} weights of {spec} where {given['count']} were asked for.")


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
