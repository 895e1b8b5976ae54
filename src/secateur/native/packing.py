"""Matrices as bits and values, by compiled kernels; the torch twins are in `secateur.core.bit_rows`.

A bit of a row is set where an element is stored; a row has ``ceil(columns / 8)`` bytes, the lowest bit of a byte first.
Bits past the last column are never read. Matrices are contiguous, on the CPU, of elements of 2 or 4 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _array, _kernels

CPU = torch.device("cpu")
"""Named wherever memory is made, since a kernel writes to it: ``with torch.device(…)`` may say otherwise."""


def mark(matrix: Tensor) -> Tensor:
    """The bits of the elements of a matrix that are not all zero bits, uint8 ``(rows, ceil(columns / 8))``."""
    ptr, _, width = _array(matrix)
    rows, columns = matrix.shape
    bits = torch.empty((rows, (columns + 7) // 8), dtype=torch.uint8, device=CPU)
    _kernels().mark(ptr, rows, columns, width, bits.data_ptr())
    return bits


def starts(bits: Tensor, columns: int) -> Tensor:
    """Where the values of each row begin, and their number last; int64 ``(rows + 1,)``."""
    out = torch.zeros(len(bits) + 1, dtype=torch.int64, device=CPU)
    _kernels().count_rows(_bits(bits, columns), len(bits), columns, out.data_ptr() + 8)
    return out.cumsum_(0)


def collect(matrix: Tensor, bits: Tensor) -> Tensor:
    """The elements whose bits are set, row after row."""
    ptr, _, width = _array(matrix)
    rows, columns = matrix.shape
    if len(bits) != rows:
        raise ValueError(f"a matrix of {rows} rows has as many rows of bits; got {len(bits)}.")
    begin = starts(bits, columns)
    values = torch.empty(int(begin[-1]), dtype=matrix.dtype, device=CPU)
    _kernels().collect(ptr, rows, columns, width, bits.data_ptr(), begin.data_ptr(), values.data_ptr())
    return values


def spread(values: Tensor, bits: Tensor, columns: int) -> Tensor:
    """The matrix that has the values where bits are set, and +0.0 elsewhere."""
    begin = starts(bits, columns)
    ptr, n, width = _array(values)
    if n != int(begin[-1]):
        raise ValueError(f"{int(begin[-1])} bits are set, and there are {n} values.")
    out = torch.empty((len(bits), columns), dtype=values.dtype, device=CPU)
    _kernels().spread(out.data_ptr(), len(bits), columns, width, bits.data_ptr(), begin.data_ptr(), ptr)
    return out


def list_columns(bits: Tensor, columns: int) -> Tensor:
    """The column of every set bit, row after row; uint16, so that there are at most 65,536 columns."""
    if columns > 1 << 16:
        raise ValueError(f"columns are listed in 16 bits; got {columns}.")
    begin = starts(bits, columns)
    out = torch.empty(int(begin[-1]), dtype=torch.uint16, device=CPU)
    _kernels().list_columns(bits.data_ptr(), len(bits), columns, begin.data_ptr(), out.data_ptr())
    return out


def _bits(bits: Tensor, columns: int) -> int:
    ptr, _, width = _array(bits)
    if width != 1 or bits.ndim != 2 or bits.shape[1] != (columns + 7) // 8:
        raise ValueError(
            f"{columns} columns have {(columns + 7) // 8} bytes of bits; got {bits.dtype} of shape {tuple(bits.shape)}."
        )
    return ptr
