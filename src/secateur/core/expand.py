"""The product with a packed matrix that is made dense again, a panel of its rows at a time, for torch's own product.

It pays where rows of the activation are many: making a panel dense costs the same for one row as for a thousand, and a panel
that is small stays in the cache until it is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur import native
from secateur.native import products as kernels

from .layouts import PAD, Layout, Parts, restore

PANEL = 1 << 22
"""Bytes of a panel, about: larger ones leave the cache before they are multiplied, smaller ones are multiplied more slowly."""


def expanded(x: Tensor, parts: Parts, layout: Layout, columns: int, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as `secateur.core.products.product` takes and gives it.

    Where torch has no instructions for 16-bit values, and neither have the kernels, the product is one of float32.

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
    rows, compiled = len(parts[2]) - 1, x.device.type == "cpu" and native.available()
    kind = kernels.whole_dtype(x.dtype) if compiled else x.dtype
    padded = -(-columns // 64) * 64
    step = max(1, min(rows, PANEL // max(1, padded * kind.itemsize)))
    room = x.new_empty((step, padded), dtype=kind) if compiled else None
    wide, bias = x.to(kind), None if bias is None else bias.to(kind)
    if step >= rows:
        return _product(wide, _panel(parts, layout, columns, 0, rows, room), bias).to(x.dtype)
    out = x.new_empty((len(x), rows))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weight = _panel(parts, layout, columns, first, last, room)
        out[:, first:last] = _product(wide, weight, None if bias is None else bias[first:last])
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _panel(parts: Parts, layout: Layout, columns: int, first: int, last: int, room: Tensor | None) -> Tensor:
    """Some rows of the weight with their zeros; in ``room`` by a kernel, where there is any."""
    if room is not None:
        return kernels.whole(layout == "bitmask", *parts, columns, first, last - first, room)
    where, values, starts = parts
    begin, end = int(starts[first]), int(starts[last]) + PAD
    rows = slice(begin, end) if layout == "csr" else slice(first, last)
    return restore((where[rows], values[begin:end], starts[first : last + 1] - begin), layout, columns)
