r"""Blocks of the empirical Fisher matrix, their inverses, and the update of the weights that survive.

A tensor's weights in row-major order are cut into blocks of ``B``, the last one shorter. For gradients ``g`` of the loss, one a
batch or sample, ``m`` in all, a block has::

    F = 1/m Σ g gᵀ + λ I                                    (B, B), λ the damping

In the second-order model of the loss ``½ δᵀ F δ``, removing a set Q of a block's weights costs least if the others move by::

    δ = -F⁻¹[:, Q] (F⁻¹[Q, Q])⁻¹ w_Q                        and then costs ½ w_Qᵀ (F⁻¹[Q, Q])⁻¹ w_Q

Singh and Alistarh, "WoodFisher: efficient second-order approximation for neural network compression" (arXiv:2004.14340); Kurtic
et al., "The optimal BERT surgeon" (arXiv:2203.07259). Three things differ from their codes:

- they build F⁻¹ from ``I/λ`` by one rank-1 step a gradient (Woodbury), all m gradients in memory or the loader read again; here
  the outer products are added up, so any number of gradients does, and F is inverted once, by Cholesky. In exact arithmetic it is
  the same matrix;
- WoodFisher adds up the updates of single removals, ``-w_q / [F⁻¹]_qq F⁻¹[:, q]``, and the optimal BERT surgeon those of small
  groups, as if each were alone; here the update is the joint one of all that go, which is the minimum;
- all is computed in float64.

A weight's gradients take ``8 B`` bytes: 400 for blocks of 50. Adding one up costs B multiplications a weight, inverting B².
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from secateur.errors import BadInput, BadTensor

from .base import NOISE, Solution, lower

AT_ONCE = 1 << 22
"""Numbers of a temporary: how many blocks are worked on together."""


def fisher_bytes(numel: int, block: int) -> int:
    """Memory that the outer products of one tensor take.

    >>> fisher_bytes(1000, 50), fisher_bytes(10, 50)
    (400000, 800)
    """
    count, size = _cut(numel, block)
    return 8 * count * size * size


def outer_products(numel: int, block: int, device: torch.device | str = "cpu") -> Tensor:
    """Zeros to add gradients to with `add_gradients`.

    Args:
        numel: weights of the tensor.
        block: weights a block; a tensor with fewer is one block.

    Returns:
        ``(blocks, B, B)`` float64. Where the last block is shorter, it is filled up with weights that have no gradient.
    """
    count, size = _cut(numel, block)
    return torch.zeros(count, size, size, dtype=torch.float64, device=device)


def add_gradients(total: Tensor, gradients: Tensor) -> None:
    """Adds ``Σ g gᵀ`` of each block to ``total``, in place.

    Args:
        total: as `outer_products` returns it.
        gradients: ``(k, numel)``, any real dtype; many at a time are faster than one.
    """
    for blocks, part in zip(*_together(total, gradients), strict=True):
        columns = part.permute(1, 2, 0)
        blocks.baddbmm_(columns, columns.transpose(1, 2))


def invert(total: Tensor, count: int, damping: float) -> float:
    """Makes of ``Σ g gᵀ`` the inverse of ``1/count Σ g gᵀ + damping I``, in place, by Cholesky.

    Where a block is singular to working precision, the damping of the tensor is raised tenfold until none is.

    Args:
        total: ``(blocks, B, B)`` float64 from `add_gradients`; holds the inverses afterwards.
        count: how many gradients were added.
        damping: λ, above 0.

    Returns:
        The damping used.

    Raises:
        BadInput: a damping that is not a number above 0, or outer products that are not finite.

    Example:
        >>> total = outer_products(2, 2)
        >>> add_gradients(total, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        >>> invert(total, 2, 1.0), total.round(decimals=6).abs().tolist()
        (1.0, [[[0.5, 0.0], [0.0, 0.5]]])
    """
    check_damping(damping)
    if not bool(torch.isfinite(total).all()):
        raise BadInput("the outer products of the gradients are not finite.")
    total /= count
    while any(factor is None for factor in _factors(total, damping)):
        damping *= 10
    for blocks, factor in zip(total.split(_blocks_at_once(total)), _factors(total, damping), strict=True):
        assert factor is not None
        blocks.copy_(torch.cholesky_inverse(factor))
    return damping


def check_damping(damping: Any) -> None:
    """Refuses what is not a number above 0."""
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not (damping > 0 and isfinite(damping)):
        raise BadInput(
            f"damping is what is added to the Fisher matrix's diagonal, a number above 0; got {damping!r}. Without it a block "
            "of more weights than there were gradients has no inverse."
        )


def diagonal(inverse: Tensor, like: Tensor) -> Tensor:
    """``[F⁻¹]_ii``, what the criterion `secateur.criteria.woodfisher` divides by.

    Args:
        inverse: ``(blocks, B, B)``.
        like: the weight.

    Returns:
        float64, of the weight's shape.
    """
    return inverse.diagonal(dim1=1, dim2=2).reshape(-1)[: like.numel()].reshape(like.shape).clone()


def update_survivors(weight: Tensor, mask: Tensor, inverse: Tensor, name: str = "") -> Tensor:
    r"""The weights after the pruned ones have gone and the others of their block have made up for it.

    ``w_S + δ_S`` with ``δ = -F⁻¹[:, Q] (F⁻¹[Q, Q])⁻¹ w_Q`` for the survivors S and the pruned Q of a block: the minimum of
    ``½ δᵀ F δ`` with ``δ_Q = -w_Q``. A weight that is zero already is a pruned one.

    Args:
        weight: any shape, any real float dtype.
        mask: bool, of its shape, True = keep.
        inverse: ``(blocks, B, B)`` float64 on its device, from `invert`.
        name: of the tensor, for the errors.

    Returns:
        A new tensor like ``weight``: pruned weights are +0.0, survivors are not zero.

    Raises:
        BadTensor: an update that the weight's dtype cannot hold.

    Example:
        >>> total = outer_products(2, 2)
        >>> add_gradients(total, torch.tensor([[1.0, 1.0]]))    # the loss feels the sum of the two weights alone
        >>> _ = invert(total, 1, 1e-9)
        >>> update_survivors(torch.tensor([2.0, 1.0]), torch.tensor([True, False]), total)
        tensor([3., 0.])
    """
    kept = mask & (weight != 0)
    moved = torch.empty(inverse.shape[:2], dtype=torch.float64, device=weight.device)
    rows = _together(inverse, torch.stack([weight.detach().reshape(-1).double(), kept.reshape(-1).double()]))
    for out, blocks, (w, live) in zip(moved.split(_blocks_at_once(inverse)), *rows, strict=True):
        out.copy_(_solve(w, live.bool(), blocks))
    new = moved.reshape(-1)[: weight.numel()].reshape(weight.shape).to(weight.dtype)
    new = torch.where(new == 0, weight.detach(), new)  # a survivor that rounds to zero would be one more pruned weight
    if not bool(torch.isfinite(new[kept]).all()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise BadTensor(
            f"the update of {name!r} (shape {tuple(weight.shape)}, {dtype}) has values that {dtype} cannot hold: raise the "
            "damping, or take more gradients."
        )
    return torch.where(kept, new, torch.zeros_like(new))


def woodfisher(weight: Tensor, *, fisher_inverse: Tensor, mask: Tensor, name: str = "") -> Solution:
    r"""WoodFisher as a solver: the criterion ``"woodfisher"`` chooses, and `update_survivors` moves what stays.

    Args:
        weight: any shape, any real float dtype; not written to.
        fisher_inverse: ``(blocks, B, B)`` float64, blocks of F⁻¹ over the weights in row-major order.
        mask: bool, of the weight's shape, True = keep.
        name: of the tensor, for the errors.

    Returns:
        A `Solution`. Its loss is ``½ δᵀ F δ``, what the model of the loss foresees; its damping is in F, and not told here.

    Example:
        >>> import torch
        >>> inverse = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64)
        >>> woodfisher(torch.tensor([2.0, 1.0]), fisher_inverse=inverse, mask=torch.tensor([True, False])).weight
        tensor([1.5000, 0.0000])
    """
    new = update_survivors(weight, mask, fisher_inverse, name)
    moved = (new.double() - weight.detach().double()).reshape(1, -1)
    loss = 0.0
    for blocks, (d,) in zip(*_together(fisher_inverse, moved), strict=True):
        loss += 0.5 * float((d * torch.linalg.solve(blocks, d.unsqueeze(2)).squeeze(2)).sum())
    return Solution(new, mask & (weight != 0), loss, None)


woodfisher.criterion = "woodfisher"  # type: ignore[attr-defined]


def _solve(w: Tensor, live: Tensor, inverse: Tensor) -> Tensor:
    """The survivors of some blocks, ``(blocks, B)``; where ``live`` is False, anything."""
    gone = ~live
    # F⁻¹[Q, Q], and the identity in the place of the survivors, so that blocks with any number of them are solved together.
    system = torch.where(gone.unsqueeze(2) & gone.unsqueeze(1), inverse, 0.0)
    system.diagonal(dim1=1, dim2=2).add_(live)
    pulled = torch.linalg.solve(system, w.masked_fill(live, 0.0).unsqueeze(2))
    return w - torch.bmm(inverse, pulled).squeeze(2)


def _cut(numel: int, block: int) -> tuple[int, int]:
    """How many blocks a tensor has, and how many weights each."""
    size = max(1, min(block, numel))
    return -(-numel // size), size


def _blocks_at_once(blocks: Tensor) -> int:
    return max(1, AT_ONCE // (blocks.shape[1] * blocks.shape[2]))


def _together(blocks: Tensor, rows: Tensor) -> tuple[tuple[Tensor, ...], Iterator[Tensor]]:
    """Groups of blocks, and for each what rows ``(k, numel)`` hold for it: ``(k, blocks, B)`` float64, zeros behind the end."""
    many, (_, size, _) = _blocks_at_once(blocks), blocks.shape

    def parts() -> Iterator[Tensor]:
        for part in rows.split(many * size, dim=1):
            short = -part.shape[1] % size
            filled = torch.cat([part.double(), part.new_zeros(len(part), short, dtype=torch.float64)], 1)
            yield filled.view(len(part), -1, size)

    return blocks.split(many), parts()


def _factors(fisher: Tensor, damping: float) -> Iterator[Tensor | None]:
    """The Cholesky factors of ``fisher + damping I``, some blocks at a time; ``None`` where one of them is singular."""
    for blocks in fisher.split(_blocks_at_once(fisher)):
        damped = blocks.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damping)
        yield lower(damped, NOISE[torch.float64])
