"""The product with a packed matrix that is made dense again, a panel of its rows at a time, for torch's own product.

It pays where rows of the activation are many: making a panel dense costs the same for one row as for a thousand, and a panel
that is small stays in the cache until it is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import PAD, Layout, Parts, restore

PANEL = 1 << 20
"""Bytes of a panel, about."""


def expanded(x: Tensor, parts: Parts, layout: Layout, columns: int, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as `secateur.core.products.product` takes and gives it.

    Args:
        x: ``(n, in)``, of the dtype of the values.
        parts: of a weight ``(out, in)``.
        layout: the layout that they are in.
        columns: ``in``.
        bias: ``(out,)``, of the same dtype.

    Returns:
        ``(n, out)``.

    Example:
        >>> from secateur.core.layouts import arrange
        >>> parts = arrange(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 5.0]]), "csr")
        >>> expanded(torch.tensor([[1.0, 10.0, 100.0]]), parts, "csr", 3)
        tensor([[ 20., 503.]])
    """
    rows = len(parts[2]) - 1
    step = max(1, PANEL // max(1, columns * x.element_size()))
    if step >= rows:
        return _product(x, restore(parts, layout, columns), bias)
    out = x.new_empty((len(x), rows))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weight = restore(_panel(parts, layout, first, last), layout, columns)
        out[:, first:last] = _product(x, weight, None if bias is None else bias[first:last])
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _panel(parts: Parts, layout: Layout, first: int, last: int) -> Parts:
    """The parts of some rows, in the same memory."""
    where, values, starts = parts
    begin, end = int(starts[first]), int(starts[last]) + PAD
    rows = slice(begin, end) if layout == "csr" else slice(first, last)
    return where[rows], values[begin:end], starts[first : last + 1] - begin
