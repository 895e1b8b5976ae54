"""A matrix as bits and values, row by row: which elements are stored, and those elements one beside the other.

*Stored* is what has any bit set, so that everything but +0.0 comes back, -0.0 and NaN included. A row has
``ceil(columns / 8)`` bytes of bits, the lowest bit of a byte first; bits past the last column are never read. Each function
runs in a native kernel where there is one (`secateur.native.packing`), and else in torch, with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur import native
from secateur.native import packing

from .bits import pack, unpack
from .layouts import stored


def mark(matrix: Tensor) -> Tensor:
    """The bits of what is stored of a contiguous matrix of 2- or 4-byte elements; uint8 ``(rows, ceil(columns / 8))``."""
    if native.available():
        return packing.mark(matrix)
    rows, columns = matrix.shape
    wide = torch.zeros((rows, -(-columns // 8) * 8), dtype=torch.bool, device=matrix.device)
    wide[:, :columns] = stored(matrix)
    return pack(wide).view(rows, -1)


def row_starts(bits: Tensor, columns: int) -> Tensor:
    """Where the values of each row begin, and their number last; int64 ``(rows + 1,)``."""
    if native.available():
        return packing.starts(bits, columns)
    counts = _marked(bits, columns).sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def collect(matrix: Tensor, bits: Tensor) -> Tensor:
    """The elements of a contiguous matrix whose bits are set, row after row."""
    return packing.collect(matrix, bits) if native.available() else matrix[_marked(bits, matrix.shape[1])]


def spread(values: Tensor, bits: Tensor, columns: int) -> Tensor:
    """The matrix with the values where bits are set, as many as there are, and +0.0 elsewhere."""
    if native.available():
        return packing.spread(values, bits, columns)
    out = values.new_zeros((len(bits), columns))
    return out.masked_scatter_(_marked(bits, columns), values)  # a single NaN keeps its bits


def columns_of(bits: Tensor, columns: int) -> Tensor:
    """The column of every set bit, row after row; uint16, so that there are at most 65,536 columns."""
    if native.available():
        return packing.list_columns(bits, columns)
    return _marked(bits, columns).nonzero()[:, 1].to(torch.uint16)


def _marked(bits: Tensor, columns: int) -> Tensor:
    """The bits as a mask, bool ``(rows, columns)``."""
    return unpack(bits.reshape(-1), 0, bits.numel() * 8).view(len(bits), -1)[:, :columns]
