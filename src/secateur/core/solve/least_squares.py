"""Least squares for a mask: the survivors as they best make up for what went."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import BadTensor

from .base import BATCH, Layer, Solution, check_damping, exactly, lower, with_damping


def refit(weight: Tensor, *, hessian: Tensor, mask: Tensor, name: str = "", damping: float = 0.0) -> Solution:
    """The survivors of a mask, moved to where the layer's outputs change least.

    Row by row, with ``S`` the survivors, ``P`` the pruned and ``w`` the weights as given::

        v_S = w_S + (H_SS + damping I)^-1 H_SP w_P

    Without damping that is the least-squares optimum ``H_SS v_S = (H w)_S``. Damping is a ridge towards the weights *as
    given*, not towards zero: it minimises ``1/2 (v - w) H (v - w)^T + damping/2 |v_S - w_S|^2``. So it cannot shrink the
    layer, as ``(H_SS + damping I) v_S = (H w)_S`` would; where nothing is pruned nothing moves; and at no damping is the
    loss larger than with the survivors left alone. Where inputs are collinear and the optimum is not unique, a small
    damping gives the one nearest to the given weights.

    Args:
        weight: (out, in), any real float dtype: the weights from *before* pruning, whose outputs are wanted back.
        hessian: (in, in), float32 or float64, as for a solver.
        mask: bool, (out, in), ``True`` = keep. It alone says what survives: a kept weight may be zero, and move.
        name: of the tensor, for messages.
        damping: share of the mean diagonal to add; where ``H_SS`` of a row is singular, it is raised for all rows.

    Returns:
        The solution, weights in float64.

    Raises:
        BadInput: a damping that is not a number >= 0.
        BadTensor: a mask of another kind, or weights or a Hessian that cannot be used.

    Example:
        >>> import torch
        >>> w, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> refit(w, hessian=h, mask=torch.tensor([[False, True]])).weight
        tensor([[0.0000, 2.5000]], dtype=torch.float64)
    """
    check_damping(damping)
    with exactly():
        layer = Layer.of(weight, hessian, name, torch.float64)
        if mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device:
            raise BadTensor(
                f"the mask of {layer.spec} must be bool, of its shape and on {weight.device}, True = keep; "
                f"got {mask.dtype}, {tuple(mask.shape)}, {mask.device}."
            )
        gone = (~mask).contiguous()
        found, added = with_damping(layer, damping, lambda h, noise: survivors(layer.weight, gone, h, noise))
        return layer.solved(found, gone, added)


def survivors(weight: Tensor, gone: Tensor, h: Tensor, noise: float) -> Tensor | None:
    """Every row with its survivors moved by ``(h_SS)^-1 h_SP w_P``, or ``None`` where an ``h_SS`` is singular.

    Args:
        weight: (out, in), float64.
        gone: bool, (out, in); what is left there is not defined.
        h: (in, in), float64; what stands on its diagonal beside the Hessian is the price of moving a survivor.
        noise: see `lower`.

    Rows are solved in batches of bounded memory, those with as many survivors together: each row's ``h_SS`` stands in the
    corner of a square that fits the largest, with ones on the rest of the diagonal.
    """
    live = (~gone).sum(1)
    out, order, at = weight.clone(), live.argsort(descending=True, stable=True), 0
    while at < len(order):
        k = int(live[order[at]])
        if k == 0:
            break
        rows = order[at : at + max(1, BATCH // (k * k))]
        at += len(rows)
        index = gone[rows].to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
        pad = gone[rows].gather(1, index)
        square = h[index[:, :, None], index[:, None, :]].masked_fill_(pad[:, :, None] | pad[:, None, :], 0.0)
        square.diagonal(dim1=1, dim2=2).add_(pad)
        factor = lower(square, noise)
        if factor is None:
            return None
        missing = ((weight[rows] * gone[rows]) @ h).gather(1, index).masked_fill_(pad, 0.0)
        moved = torch.cholesky_solve(missing[:, :, None], factor)[:, :, 0]
        out[rows] = weight[rows].scatter_add(1, index, moved)
    return out
