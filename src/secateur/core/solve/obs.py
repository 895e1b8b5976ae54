"""Optimal Brain Surgeon: exact greedy removal, one weight after another, and what the rest of its row does about it.

Removing weight ``j`` of a row whose live weights have the inverse Hessian ``G`` costs at least, and moves the others by::

    w_j^2 / (2 G_jj)        w <- w - w_j / G_jj * G e_j        after which        G <- G - G e_j e_j^T G / G_jj

Rows do not see each other: they share ``H``, but each has its own ``G`` from its first removal on. So the greedy order over
a layer is the rows' own orders, merged by taking, again and again, the row whose next removal is cheapest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.keys import HIGHEST
from secateur.core.patterns import NM, Pattern
from secateur.errors import BadInput, NotDefined

from .base import BATCH, Layer, Solution, check_damping, check_request, exactly, first, keys_of, lower, with_damping
from .least_squares import survivors

LARGEST = 1 << 25
"""What ``out * in * in`` may be for `OBS`: the inverses of all rows, 256 MiB."""


@dataclass(frozen=True)
class OBS:
    """Optimal Brain Surgeon as it was written down: every step looks at the whole layer, removes one weight, moves its row.

    The reference the others are measured against, for small layers: it holds an inverse a row, ``out * in^2`` numbers of 8
    bytes, and refuses layers with more than 2^25 of them. `ExactOBS` gives the same mask (but where two costs are equal to
    rounding error) and weights for less, and N:M.

    Weights go in the order (zero already, of a dead input, cost), of equal cost the one with the lower flat index.

    Where it differs from the paper: that looks at all weights of a network with one Hessian; with the layer-wise loss the
    Hessian falls apart into one block a row, all alike.

    Args:
        damping: share of the mean diagonal added to the Hessian, >= 0. The paper adds a number between 1e-8 and 1e-4; here
            the default is that of `SparseGPT`.

    Raises:
        BadInput: another damping.

    Called as a `Solver`, `Unstructured` only; works in float64 and returns it.

    Example:
        >>> import torch
        >>> from secateur.core.patterns import Unstructured
        >>> w, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> OBS(damping=0.0)(w, hessian=h, pattern=Unstructured(), count=1)[:3]
        (tensor([[0.0000, 2.5000]], dtype=torch.float64), tensor([[False,  True]]), 0.75)

    Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (NIPS 1992); the layer-wise
    loss as in Dong et al., "Learning to prune deep neural networks via layer-wise Optimal Brain Surgeon" (arXiv:1705.07565).
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, weight: Tensor, *, hessian: Tensor, pattern: Pattern, count: int, name: str = "") -> Solution:
        """See `Solver`.

        Raises:
            BadInput: a count out of range, or a layer too large.
            BadTensor: weights or a Hessian that cannot be used; see `Layer.of` and `with_damping`.
            NotDefined: another pattern than `Unstructured`.
        """
        with exactly():
            layer = Layer.of(weight, hessian, name, torch.float64)
            check_request(layer.spec, pattern, count)
            if isinstance(pattern, NM):
                raise NotDefined(f"OBS removes single weights, and {pattern} was asked of {layer.spec}: take ExactOBS.")
            rows, inputs = layer.spec.shape
            if rows * inputs**2 > LARGEST:
                raise BadInput(
                    f"OBS would hold {rows} inverses of {inputs} x {inputs} for {layer.spec}, {rows * inputs**2} numbers; "
                    f"it takes at most {LARGEST}. Take ExactOBS, or SparseGPT where that takes too long."
                )
            if count <= int(layer.zero.sum()):
                return layer.solved(layer.weight, layer.zero, 0.0)
            inverse, damping = with_damping(layer, self.damping, inverse_of)
            return layer.solved(*remove_one_by_one(layer, inverse, count), damping)


def inverse_of(h: Tensor, noise: float) -> Tensor | None:
    """The inverse, or ``None`` where the matrix is singular (see `lower`)."""
    factor = lower(h, noise)
    return None if factor is None else torch.cholesky_inverse(factor)


def remove_one_by_one(layer: Layer, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The weights after ``count`` removals, each the cheapest of all there are, and which went."""
    w, inverses = layer.weight.clone(), inverse.expand(len(layer.weight), -1, -1).clone()
    gone = torch.zeros_like(layer.zero)
    keys = keys_of(w.square() / inverse.diagonal(), layer.zero, layer.dead)
    best = keys.amin(1)
    for _ in range(count):
        row = int(best.argmin())
        at = int(keys[row].argmin())
        g, column = inverses[row], inverses[row, at] / inverses[row, at, at]
        w[row] -= w[row, at] * column
        g -= torch.outer(column, g[at])
        gone[row, at] = True
        cost = w[row].square() / g.diagonal()
        keys[row] = keys_of(cost, layer.zero[row], layer.dead).masked_fill_(gone[row], HIGHEST)
        best[row] = keys[row].min()
    return w, gone


@dataclass(frozen=True)
class ExactOBS:
    """ExactOBS, the pruning half of Optimal Brain Compression: greedy row by row, then one selection over all rows.

    Each row is taken apart to the end, and its order and costs are kept. **Which go:** a row's costs need not rise (where
    two inputs carry the same, the second to go is the dear one, and what comes after may be cheap again), and yet a row can
    only lose a *prefix* of its own order. So a removal counts as the dearest up to and including it in its row; of these
    running maxima the lowest go, ``count`` of them exactly, of equal ones in the order (row, step). That is the same as
    taking, again and again, the row whose next removal is cheapest: the greedy order of `OBS`. **What stays** is not taken
    from the trace but solved anew for the mask, by the equations of `refit` with the same damping.

    Weights go in the order (zero already, of a dead input, cost), of equal cost the one with the lower flat index. N:M: a
    group that has lost M - N is closed; all rows lose the same share, so there is nothing to select over rows.

    Work ``out * in^3 / 2``, memory bounded: rows go in batches. Instead of a matrix a row, a batch keeps the removed
    rows of each inverse, scaled (a pivoted Cholesky factor of ``H^-1``), which is exact and half the work.

    Where it differs from the paper's code: that sorts the costs themselves and then takes as many of each row as were among
    the lowest, which may not be the removals it counted; it prunes ``ceil`` of the share; it casts ``H`` to float32 before
    inverting it, undamped, and adds 1 to the diagonal where that fails.

    Args:
        damping: share of the mean diagonal added to the Hessian, >= 0; the default is that of `SparseGPT`.

    Raises:
        BadInput: another damping.

    Called as a `Solver`; works in float64 and returns it.

    Example:
        >>> import torch
        >>> from secateur.core.patterns import NM
        >>> w, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> ExactOBS(damping=0.0)(w, hessian=h, pattern=NM(1, 2), count=1)[:3]
        (tensor([[0.0000, 2.5000]], dtype=torch.float64), tensor([[False,  True]]), 0.75)

    Frantar, Singh and Alistarh, "Optimal Brain Compression: a framework for accurate post-training quantization and
    pruning" (arXiv:2208.11580).
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, weight: Tensor, *, hessian: Tensor, pattern: Pattern, count: int, name: str = "") -> Solution:
        """See `Solver`.

        Raises:
            BadInput: a count out of range.
            BadTensor: weights or a Hessian that cannot be used; see `Layer.of` and `with_damping`.
            NotDefined: see `check_request`.
        """
        with exactly():
            layer = Layer.of(weight, hessian, name, torch.float64)
            check_request(layer.spec, pattern, count)
            nm = pattern if isinstance(pattern, NM) else None
            if nm is None and count <= int(layer.zero.sum()):
                return layer.solved(layer.weight, layer.zero, 0.0)
            inverse, damping = with_damping(layer, self.damping, inverse_of)
            order, keys = traces(layer, inverse, steps_of(layer, nm, count), nm)
            chosen = keys != HIGHEST if nm is not None else cheapest(keys, count)
            row, step = chosen.nonzero(as_tuple=True)
            gone = torch.zeros_like(layer.zero)
            gone[row, order[row, step]] = True
            moved = survivors(layer.weight, gone, layer.damped(damping), noise=0.0)
            assert moved is not None, "a part of a positive definite matrix is positive definite"
            return layer.solved(moved, gone, damping)


def steps_of(layer: Layer, nm: NM | None, count: int) -> int:
    """How many removals a row's trace needs at most."""
    zeros = layer.zero.sum(1)
    if nm is None:
        return min(layer.spec.shape[1], int(zeros.max()) + count - int(zeros.sum()))
    in_group = layer.zero.view(len(zeros), -1, nm.of).sum(2)
    return int(in_group.clamp(min=nm.of - nm.keep).sum(1).max())


def cheapest(keys: Tensor, count: int) -> Tensor:
    """Which removals of the traces are made: ``count`` in all, of each row a prefix; bool, of the keys' shape.

    >>> cheapest(torch.tensor([[4, 1, 9], [5, 6, 7]]), 3)        # the 1 comes with the 4 before it
    tensor([[ True,  True, False],
            [ True, False, False]])
    """
    return first(keys.cummax(1).values, count)


def traces(layer: Layer, inverse: Tensor, steps: int, nm: NM | None) -> tuple[Tensor, Tensor]:
    """The greedy order of every row: which weight goes at each step, and the key of its cost; int64, (out, steps).

    Args:
        layer: the layer.
        inverse: of its damped Hessian.
        steps: how many.
        nm: groups to be closed, if any; a row that has no more to lose has the key `HIGHEST` from then on.
    """
    size = max(1, BATCH // (steps * len(inverse)))
    found = [
        _trace(w, zero, layer.dead, inverse, steps, nm)
        for w, zero in zip(layer.weight.split(size), layer.zero.split(size), strict=True)
    ]
    order, keys = (torch.cat(parts) for parts in zip(*found, strict=True))
    return order, keys


def _trace(w: Tensor, zero: Tensor, dead: Tensor, inverse: Tensor, steps: int, nm: NM | None) -> tuple[Tensor, Tensor]:
    """`traces` of a batch of rows.

    A row's inverse after some removals is ``H^-1 - V^T V``, where ``V`` has a row for each: that of the inverse as it was
    when the weight went, over the root of its pivot. Only its diagonal, and the row that goes next, are ever worked out.
    """
    rows, inputs = w.shape
    w, diagonal = w.clone(), inverse.diagonal().expand_as(w).clone()
    v = torch.empty(rows, steps, inputs, dtype=w.dtype, device=w.device)
    order = torch.empty(rows, steps, dtype=torch.int64, device=w.device)
    keys, every = torch.empty_like(order), torch.arange(rows, device=w.device)
    removed = closed = torch.zeros_like(zero)
    for k in range(steps):
        key = keys_of(w.square() / diagonal, zero, dead).masked_fill_(closed, HIGHEST)
        at = key.argmin(1, keepdim=True)
        order[:, k : k + 1], keys[:, k : k + 1] = at, key.gather(1, at)
        before = v[:, :k]
        row = inverse[at[:, 0]] - torch.bmm(before[every, :, at[:, 0]][:, None, :], before)[:, 0]
        root = diagonal.gather(1, at).sqrt()
        v[:, k] = row.div_(root)
        w -= row * (w.gather(1, at) / root)
        diagonal.addcmul_(row, row, value=-1)
        closed = removed = removed.scatter(1, at, True)
        if nm is not None:  # a row that has lost its share goes through the motions, under a key that nothing takes
            full = removed.view(rows, -1, nm.of).sum(2) >= nm.of - nm.keep
            closed = removed | (full.repeat_interleave(nm.of, dim=1) & ~zero)
    return order, keys
