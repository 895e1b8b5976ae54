"""The parts of a packed matrix, from anywhere: checked before a kernel follows what they say."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import BadTensor

from .bit_rows import row_starts
from .layouts import DTYPES, PAD, Layout, Parts, stored


def check(parts: Parts, layout: Layout, shape: tuple[int, int]) -> None:
    """Refuses what `secateur.core.layouts.arrange` cannot have made of a matrix of this shape, so that kernels need not look.

    Args:
        parts: from anywhere.
        layout: the layout that they are said to be in.
        shape: ``(out, in)``.

    Raises:
        BadTensor: a part of another dtype, size or device; counts that do not agree; columns that are not there.

    Example:
        >>> from secateur.core.layouts import arrange
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
    if not torch.equal(row_starts(bits, 8 * bits.shape[1]), starts):
        raise BadTensor("a row has another number of bits than of values.")
