"""Products with a matrix that lies packed."""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import Layout, Parts, restore


def product(x: Tensor, parts: Parts, layout: Layout, columns: int, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, the weight as `secateur.core.layouts.arrange` laid it out.

    Args:
        x: ``(n, in)``, contiguous, of the dtype of the values; ``n`` may be 0.
        parts: of a weight ``(out, in)``.
        layout: the layout that they are in.
        columns: ``in``.
        bias: ``(out,)``, of the same dtype.

    Returns:
        ``(n, out)``. NaN and infinity in ``x`` give what they give with the whole matrix.

    Example:
        >>> from secateur.core.layouts import arrange
        >>> parts = arrange(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 5.0]]), "csr")
        >>> product(torch.tensor([[1.0, 10.0, 100.0]]), parts, "csr", 3)
        tensor([[ 20., 503.]])
    """
    weight = restore(parts, layout, columns).t()
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
