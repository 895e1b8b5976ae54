"""How a pruned matrix lies in memory for a product: the weights that are not zero, and where they belong.

A matrix is ``(out, in)``, row after row. *Stored* are the elements whose bits are not those of +0.0, so that restoring
gives every bit back, -0.0 and NaN included. Both layouts end in `PAD` zeros, so that kernels may read whole vectors at the
end of the last row.

==========  ========================================================================================================
layout      parts
==========  ========================================================================================================
``bitmask``  ``bits`` uint8 ``(out, 8 * ceil(in / 64))``, the lowest bit of a byte first, set where an element is stored;
            ``values`` ``(stored + PAD,)``; ``starts`` int64 ``(out + 1,)``, where each row's values begin
``csr``     ``columns`` uint16 ``(stored + PAD,)``; ``values`` and ``starts`` as above; ``in`` at most 65,536
==========  ========================================================================================================
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur.errors import NotDefined

from .bits import pack, unpack

Layout = Literal["bitmask", "csr"]
LAYOUTS: tuple[Layout, ...] = ("bitmask", "csr")
Parts = tuple[Tensor, Tensor, Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAD = 64
MOST_COLUMNS = 1 << 16


def stored(t: Tensor) -> Tensor:
    """Where the bits of an element are not those of +0.0; bool."""
    return t.detach().view({2: torch.int16, 4: torch.int32}[t.dtype.itemsize]) != 0


def arrange(weight: Tensor, layout: Layout) -> Parts:
    """Lays a matrix out.

    Args:
        weight: ``(out, in)``, float32, bfloat16 or float16, on the CPU.
        layout: one of `LAYOUTS`.

    Raises:
        NotDefined: ``csr`` of more than 65,536 columns.

    Example:
        >>> bits, values, starts = arrange(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 5.0]]), "bitmask")
        >>> bits[:, 0].tolist(), values[:3].tolist(), starts.tolist()
        ([2, 5], [2.0, 3.0, 5.0], [0, 1, 3])
    """
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    if layout == "csr" and columns > MOST_COLUMNS:
        raise NotDefined(
            f"csr numbers columns in 16 bits, at most {MOST_COLUMNS:,}; the matrix has {columns:,}: use bitmask."
        )
    kept = stored(weight)
    counts = kept.sum(1)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = torch.cat([weight[kept], weight.new_zeros(PAD)])
    if layout == "csr":
        where = kept.nonzero()[:, 1].to(torch.int32)
        return torch.cat([where, where.new_zeros(PAD)]).to(torch.uint16), values, starts
    wide = torch.zeros((rows, -(-columns // 64) * 64), dtype=torch.bool)
    wide[:, :columns] = kept
    return pack(wide).view(rows, wide.shape[1] // 8), values, starts


def restore(parts: Parts, layout: Layout, columns: int) -> Tensor:
    """The matrix that `arrange` laid out, to the bit."""
    where, values, starts = parts
    rows, count = len(starts) - 1, len(values) - PAD
    out = values.new_zeros((rows, columns))
    if layout == "csr":
        row = torch.repeat_interleave(torch.arange(rows), starts.diff())
        out[row, where[:count].to(torch.int64)] = values[:count]
    else:
        kept = unpack(where.view(-1), 0, where.numel() * 8).view(rows, 8 * where.shape[1])[:, :columns]
        out.masked_scatter_(kept, values[:count])  # an assignment would fill in a single value, and a NaN lose its bits
    return out
