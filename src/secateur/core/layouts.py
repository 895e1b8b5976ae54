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

from secateur.errors import BadTensor, NotDefined

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
    return pack(wide).view(rows, -1), values, starts


def restore(parts: Parts, layout: Layout, columns: int) -> Tensor:
    """The matrix that `arrange` laid out, to the bit."""
    where, values, starts = parts
    rows, count = len(starts) - 1, len(values) - PAD
    out = values.new_zeros((rows, columns))
    if layout == "csr":
        row = torch.repeat_interleave(torch.arange(rows), starts.diff())
        out[row, where[:count].to(torch.int64)] = values[:count]
    else:
        out[unpack(where.view(-1), 0, where.numel() * 8).view(rows, -1)[:, :columns]] = values[:count]
    return out


def check(parts: Parts, layout: Layout, shape: tuple[int, int]) -> None:
    """Refuses parts that `arrange` cannot have made of a matrix of this shape, so that kernels need not look.

    Args:
        parts: from anywhere.
        layout: the layout that they are said to be in.
        shape: ``(out, in)``.

    Raises:
        BadTensor: a part of another dtype, size or device; counts that do not agree; columns that are not there.

    Example:
        >>> where, values, starts = arrange(torch.eye(3), "csr")
        >>> check((where, values, starts - 1), "csr", (3, 3))
        Traceback (most recent call last):
        secateur.errors.BadTensor: the starts of the rows do not rise from 0 to the 3 values that there are.
    """
    rows, columns = shape
    where, values, starts = parts
    where_type, where_shape = (
        (torch.uint16, values.shape) if layout == "csr" else (torch.uint8, (rows, -(-columns // 64) * 8))
    )
    for name, part, types, wanted in (
        ("values", values, DTYPES, None),
        ("starts", starts, (torch.int64,), (rows + 1,)),
        ("columns" if layout == "csr" else "bits", where, (where_type,), where_shape),
    ):
        _check_part(name, part, types, wanted)
    count = len(values) - PAD
    rising = bool((starts[1:] >= starts[:-1]).all())
    if not rising or int(starts[0]) != 0 or int(starts[-1]) != count:
        raise BadTensor(f"the starts of the rows do not rise from 0 to the {count} values that there are.")
    if bool(stored(values[count:]).any()):
        raise BadTensor(f"the values do not end in {PAD} zeros, which kernels read past the last row.")
    if layout == "csr":
        _check_columns(where, starts, columns)
    else:
        _check_bits(where, starts, columns)


def _check_part(name: str, part: Tensor, types: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> None:
    plain = type(part) is Tensor and part.layout is torch.strided and part.device.type == "cpu"
    fits = tuple(part.shape) == tuple(shape) if shape is not None else part.dim() == 1 and len(part) >= PAD
    if not plain or part.dtype not in types or not fits or not part.is_contiguous():
        wanted = f"of shape {tuple(shape)}" if shape is not None else f"in one dim, {PAD} of them at least"
        raise BadTensor(
            f"{name} are contiguous {' or '.join(str(t).removeprefix('torch.') for t in types)} on the CPU, {wanted}; got "
            f"{str(part.dtype).removeprefix('torch.')} of shape {tuple(part.shape)} on {part.device}."
        )


def _check_columns(where: Tensor, starts: Tensor, columns: int) -> None:
    count = len(where) - PAD
    numbers = where.to(torch.int32)
    if count and int(numbers[:count].max()) >= columns:
        raise BadTensor(f"a weight is in column {int(numbers[:count].max())} of a matrix of {columns} columns.")
    if numbers[count:].any():
        raise BadTensor(f"the columns do not end in {PAD} zeros, which kernels read past the last row.")
    rising = torch.ones(count + 1, dtype=torch.bool)
    rising[1:count] = numbers[1:count] > numbers[: count - 1] if count else True
    rising[starts] = True
    if not rising.all():
        raise BadTensor("the columns of a row do not rise.")


def _check_bits(bits: Tensor, starts: Tensor, columns: int) -> None:
    past = bits[:, columns // 8 :].clone()
    if columns % 8 and past.numel():
        past[:, 0] &= 256 - (1 << columns % 8)
    if past.any():
        raise BadTensor(f"bits are set past the last of {columns} columns.")
    if not torch.equal(_ones(bits), starts.diff()):
        raise BadTensor("a row has another number of bits than of values.")


def _ones(bits: Tensor) -> Tensor:
    """How many bits are set in each row, whose bytes are a multiple of eight."""
    x = bits.clone().view(torch.int64)
    x = (x & 0x5555555555555555) + ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x & 0x0F0F0F0F0F0F0F0F) + ((x >> 4) & 0x0F0F0F0F0F0F0F0F)
    return x.view(torch.uint8).sum(1, dtype=torch.int64)
