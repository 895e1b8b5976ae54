"""From how a tensor lies in a file to how it lies for products; see `secateur.core.packed` and `secateur.core.layouts`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.errors import NotDefined

from .bit_rows import columns_of, row_starts, spread
from .layouts import MOST_COLUMNS, PAD, Layout, Parts, restore
from .packed import Encoding, Packed, decode, encode

ENCODING: Mapping[Layout, Encoding] = {"bitmask": "bitmask", "csr": "csr-u16"}
CHUNK = 1 << 22
"""Elements that are dense at a time where an encoding has to become another."""


def arranged(weight: Tensor, layout: Layout) -> Parts:
    """What `secateur.core.layouts.arrange` gives, by native kernels where there are any.

    Raises:
        NotDefined: ``csr`` of more than 65,536 columns.

    Example:
        >>> bits, values, starts = arranged(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 5.0]]), "bitmask")
        >>> bits[:, 0].tolist(), values[:3].tolist(), starts.tolist()
        ([2, 5], [2.0, 3.0, 5.0], [0, 1, 3])
    """
    return lay_out(encode(weight, ENCODING[layout]), layout)


def restored(parts: Parts, layout: Layout, columns: int) -> Tensor:
    """What `secateur.core.layouts.restore` gives, by native kernels where there are any.

    Example:
        >>> restored(arranged(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), "bitmask"), "bitmask", 2)
        tensor([[0., 2.],
                [3., 0.]])
    """
    where, values, _ = parts
    if layout == "csr":
        return restore(parts, layout, columns)
    wide = where.shape[1] * 8
    out = spread(values[: len(values) - PAD], where, wide)
    return out if columns == wide else out[:, :columns].clone(memory_format=torch.contiguous_format)


def lay_out(packed: Packed, layout: Layout) -> Parts:
    """The parts of a matrix that lies as in a file: a row for each of its first dim, all others as columns.

    A bitmask stays one, and ``csr-u16`` stays ``csr``; of anything else some rows are dense at a time.

    Args:
        packed: of float32, bfloat16 or float16, in two dims or more; from `encode`, or checked.
        layout: the layout to be.

    Raises:
        NotDefined: ``csr`` of more than 65,536 columns.

    Example:
        >>> weight = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 5.0]])
        >>> columns, values, starts = lay_out(encode(weight, "bitmask"), "csr")
        >>> columns[:3].tolist(), starts.tolist()
        ([1, 0, 2], [0, 1, 3])
    """
    rows, columns = packed.shape[0], math.prod(packed.shape[1:])
    if layout == "csr" and columns > MOST_COLUMNS:
        raise NotDefined(
            f"csr numbers columns in 16 bits, at most {MOST_COLUMNS:,}; the matrix has {columns:,}: use bitmask."
        )
    if packed.encoding == "bitmask":
        bits, values = packed.parts["bits"], packed.parts["values"]
        where = _whole_words(bits) if layout == "bitmask" else _padded(columns_of(bits, columns))
        return where, _padded(values), row_starts(bits, columns)
    if packed.encoding == "csr-u16" and layout == "csr":
        return _padded(packed.parts["columns"]), _padded(packed.parts["values"]), packed.parts["starts"]
    step = max(1, CHUNK // max(1, columns))
    parts = [arranged(_some_rows(packed, columns, at, min(at + step, rows)), layout) for at in range(0, rows, step)]
    return _joined(parts, layout)


def _padded(t: Tensor) -> Tensor:
    """A run of values or columns, and the zeros that kernels may read past its end."""
    return torch.cat([t.view(-1), t.new_zeros(PAD)])


def _whole_words(bits: Tensor) -> Tensor:
    """The bits of rows, each of which ends in a whole word of 64."""
    rows, width = bits.shape
    out = bits.new_zeros((rows, -(-width // 8) * 8))
    out[:, :width] = bits
    return out


def _some_rows(packed: Packed, columns: int, first: int, last: int) -> Tensor:
    """Some rows of a matrix, dense."""
    parts = packed.parts
    if packed.encoding == "dense":
        return parts["values"].view(-1, columns)[first:last]
    if packed.encoding == "csr-u16":
        begin, end = int(parts["starts"][first]), int(parts["starts"][last])
        starts = parts["starts"][first : last + 1] - begin
        some = {"columns": parts["columns"][begin:end], "starts": starts, "values": parts["values"][begin:end]}
    else:
        some = {name: part[first:last] for name, part in parts.items()}
    return decode(Packed(packed.encoding, (last - first, columns), packed.dtype, some))


def _joined(parts: list[Parts], layout: Layout) -> Parts:
    """The parts of matrices one below the other."""
    wheres, values, starts = zip(*parts, strict=True)
    counts = torch.cat([s.diff() for s in starts])
    if layout == "csr":
        where = _padded(torch.cat([w[:-PAD] for w in wheres]))
    else:
        where = torch.cat(wheres)
    return where, _padded(torch.cat([v[:-PAD] for v in values])), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
