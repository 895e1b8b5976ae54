"""Products with a matrix that lies packed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur import native
from secateur.native import products as kernels

from .layouts import PAD, Layout, Parts, restore

Method = Literal["direct", "skip", "tile", "pairs"]
DIRECT = {"bitmask": 4, "csr": 1}
"""Most inputs that are multiplied one at a time."""
FEW = 16
SKIP_BELOW = {"bitmask": (0.15, 0.22), "csr": (1.0, 1.0)}
"""The density below which only stored weights are multiplied, for few inputs and for more; above, the matrix is spread out,
some rows at a time."""
PAIRS_FROM = {"bitmask": 64, "csr": 144}
PAIRS = (0.07, 0.27)
"""Inputs from which, and densities between which, pairs of columns that are both zero are left out, where there are such kernels.
With fewer weights skipping single ones is as fast, and with more hardly a pair is left out."""


def product(
    x: Tensor, parts: Parts, layout: Layout, columns: int, bias: Tensor | None = None, method: Method | None = None
) -> Tensor:
    """``x @ weight.T + bias``, the weight as `secateur.core.layouts.arrange` laid it out.

    Args:
        x: ``(n, in)``, contiguous, of the dtype of the values; ``n`` may be 0.
        parts: of a weight ``(out, in)``.
        layout: the layout that they are in.
        columns: ``in``.
        bias: ``(out,)``, of the same dtype.
        method: how the kernels multiply; `method_of` chooses. Without kernels the matrix is made whole.

    Returns:
        ``(n, out)``. NaN and infinity in ``x`` give what they give with the whole matrix.

    Example:
        >>> from secateur.core.layouts import arrange
        >>> parts = arrange(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 5.0]]), "csr")
        >>> product(torch.tensor([[1.0, 10.0, 100.0]]), parts, "csr", 3)
        tensor([[ 20., 503.]])
    """
    if x.device.type != "cpu" or not native.available():
        weight = restore(parts, layout, columns).t()
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
    method = method or method_of(layout, parts, columns, x.shape[0])
    return kernels.product(x, layout == "bitmask", *parts, columns, bias, method)


def method_of(layout: Layout, parts: Parts, columns: int, n: int) -> Method:
    """How to multiply ``n`` inputs: a rule of sizes alone, so that the same call gives the same bits."""
    if n <= DIRECT[layout]:
        return "direct"
    stored, size = parts[1].numel() - PAD, (parts[2].numel() - 1) * columns
    pairs = kernels.skips_pairs(parts[1].dtype)
    if pairs and n >= PAIRS_FROM[layout] and PAIRS[0] * size < stored < PAIRS[1] * size:
        return "pairs"
    return "skip" if stored < SKIP_BELOW[layout][n > FEW and not pairs] * size else "tile"
