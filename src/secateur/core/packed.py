"""How a tensor lies in a packed file: the weights that are not zero, and where they belong.

A tensor is seen as a matrix: ``shape[0]`` rows, and the product of its other dims as columns, row after row. *Stored* are
the elements that have any bit set, so that every bit comes back, -0.0 and NaN included. The parts of an encoding do not
depend on the machine, and a tensor has one way to be written in each:

==============  ====================================================================================================
encoding        parts
==============  ====================================================================================================
``dense``       ``values``: the tensor itself
``bitmask``     ``bits`` uint8 ``(rows, ceil(columns / 8))``, the lowest bit of a byte first, set where an element is
                stored, 0 past the last column; ``values`` ``(stored,)``
``csr-u16``     ``columns`` uint16 ``(stored,)``, ascending in a row; ``starts`` int64 ``(rows + 1,)``, where the values of
                each row begin; ``values`` ``(stored,)``; at most 65,536 columns
``2:4``         ``places`` uint8 ``(rows, columns / 8)``, four bits a group of four columns, the first group lowest: the
                column of its first value in the group, and four times that of its second; ``values``
                ``(rows, columns / 2)``; at most two stored in each group, and a multiple of 8 columns
==============  ====================================================================================================

A +0.0 among the values of ``bitmask`` or ``csr-u16`` is refused. ``2:4`` needs it, where a group stores fewer than two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import BadInput, NotDefined

from .bit_rows import collect, columns_of, mark, row_starts, spread
from .layouts import MOST_COLUMNS

Encoding = Literal["dense", "bitmask", "csr-u16", "2:4"]
ENCODINGS: tuple[Encoding, ...] = ("dense", "2:4", "bitmask", "csr-u16")
"""In the order in which they are chosen where they take as many bytes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What can be stored otherwise than dense."""
Form = tuple[torch.dtype, tuple[int, ...] | None]
"""Dtype and shape of a part; no shape where there are as many elements as are stored."""


@dataclass(frozen=True, eq=False)
class Packed:
    """One tensor as it lies in a packed file.

    Attributes:
        encoding: one of `ENCODINGS`.
        shape, dtype: the tensor's own.
        parts: tensors by the names that the encoding gives them, contiguous, on the CPU.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(p.numel() * p.element_size() for p in self.parts.values())

    @property
    def count(self) -> int:
        """Number of values that are kept."""
        return self.parts["values"].numel()


def packable(t: Tensor) -> bool:
    """Whether a tensor can be stored otherwise than dense: float32, bfloat16 or float16, two dims or more, not empty."""
    return t.dtype in DTYPES and t.ndim >= 2 and t.numel() > 0


def encode(t: Tensor, encoding: Encoding | None = None) -> Packed:
    """A tensor in an encoding, or in the one that takes the fewest bytes; `dense` unless another takes fewer.

    Args:
        t: any shape and dtype, on the CPU; what cannot be packed (see `packable`) is dense.
        encoding: one of `ENCODINGS`; ``None`` for the smallest.

    Returns:
        What `decode` turns back into the same bits. A dense one holds the tensor's own memory where that is contiguous.

    Raises:
        NotDefined: an encoding that the tensor does not fit.

    Example:
        >>> packed = encode(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), "bitmask")
        >>> packed.parts["bits"].tolist(), packed.parts["values"].tolist()
        ([[2], [1]], [2.0, 3.0])
        >>> decode(packed)
        tensor([[0., 2., 0.],
                [3., 0., 0.]])
        >>> encode(torch.ones(4, 4)).encoding
        'dense'
    """
    t = t.detach().contiguous()
    if encoding is None and packable(t):
        bits = mark(t.view(len(t), -1))
        return _encoded(t, bits, min(sizes(t, bits).items(), key=lambda item: item[1])[0])
    if encoding in (None, "dense"):
        return Packed("dense", tuple(t.shape), t.dtype, {"values": t})
    if why := misfit(encoding, tuple(t.shape), t.dtype):
        raise NotDefined(f"a tensor of shape {tuple(t.shape)} and {t.dtype} cannot be {encoding}: {why}.")
    return _encoded(t, mark(t.view(len(t), -1)), encoding)


def sizes(t: Tensor, bits: Tensor) -> dict[Encoding, int]:
    """Bytes of a contiguous `packable` tensor in each encoding that fits; of equal ones the first is to be chosen."""
    rows, columns, width = len(t), t.numel() // len(t), t.element_size()
    count = int(row_starts(bits, columns)[-1])
    found: dict[Encoding, int] = {"dense": t.numel() * width}
    if 2 * count == t.numel() and columns % 8 == 0 and bool(_fits(bits)):  # with fewer stored, bitmask is smaller
        found["2:4"] = bits.numel() + count * width
    found["bitmask"] = bits.numel() + count * width
    if columns <= MOST_COLUMNS:
        found["csr-u16"] = 8 * (rows + 1) + count * (2 + width)
    return found


def _encoded(t: Tensor, bits: Tensor, encoding: Encoding) -> Packed:
    matrix = t.view(len(t), -1)
    if encoding == "dense":
        parts = {"values": t}
    elif encoding == "bitmask":
        parts = {"bits": bits, "values": collect(matrix, bits)}
    elif encoding == "csr-u16":
        columns = matrix.shape[1]
        parts = {
            "columns": columns_of(bits, columns), "starts": row_starts(bits, columns), "values": collect(matrix, bits)
        }  # fmt: skip
    else:
        if not _fits(bits):
            raise NotDefined(f"a tensor of shape {tuple(t.shape)} is not 2:4: a group of four stores three or more.")
        padded, places, _ = _tables()
        pairs = padded[bits.int()]
        parts = {"places": places[pairs.int()], "values": collect(matrix, pairs).view(len(t), -1)}
    return Packed(encoding, tuple(t.shape), t.dtype, parts)


def decode(packed: Packed) -> Tensor:
    """The tensor that was encoded, to the bit.

    Args:
        packed: from `encode`, or from anywhere after `check`.

    Returns:
        A contiguous tensor of the same shape and dtype; of a dense one, its own values.
    """
    parts, shape = packed.parts, packed.shape
    values = parts["values"]
    if packed.encoding == "dense":
        return values
    columns = math.prod(shape[1:])
    if packed.encoding == "bitmask":
        return spread(values, parts["bits"], columns).view(shape)
    if packed.encoding == "2:4":
        return spread(values.view(-1), _tables()[2][parts["places"].int()], columns).view(shape)
    out = values.new_zeros(shape)
    first = torch.arange(shape[0], device=values.device) * columns
    where = torch.repeat_interleave(first, parts["starts"].diff()) + parts["columns"].to(torch.int64)
    out.view(-1)[where] = values
    return out


def misfit(encoding: Encoding, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why no tensor of a shape and dtype can be stored so; ``None`` if some can."""
    if encoding == "dense":
        return None
    columns = math.prod(shape[1:])
    if dtype not in DTYPES:
        return "only float32, bfloat16 and float16 are"
    if len(shape) < 2 or shape[0] * columns == 0:
        return "it needs two dims or more, none of them 0"
    if encoding == "csr-u16" and columns > MOST_COLUMNS:
        return f"columns are numbered in 16 bits, at most {MOST_COLUMNS:,}, and it has {columns:,}"
    if encoding == "2:4" and columns % 8:
        return f"it needs a multiple of 8 columns, and has {columns:,}"
    return None


def forms(encoding: Encoding, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Form]:
    """The parts of an encoding; those that say where the values belong come first, and how many there are follows."""
    if encoding == "dense":
        return {"values": (dtype, shape)}
    rows, columns = shape[0], math.prod(shape[1:])
    if encoding == "bitmask":
        return {"bits": (torch.uint8, (rows, -(-columns // 8))), "values": (dtype, None)}
    if encoding == "csr-u16":
        return {"starts": (torch.int64, (rows + 1,)), "columns": (torch.uint16, None), "values": (dtype, None)}
    return {"places": (torch.uint8, (rows, columns // 8)), "values": (dtype, (rows, columns // 2))}


def check(packed: Packed) -> None:
    """Refuses parts that are not what `encode` makes; nothing larger than they are is allocated.

    Raises:
        BadInput: another encoding, shape or dtype; a part too many, missing, or of another shape or dtype; bits set past the
            last column; as many values as bits set they are not; starts that fall, or go past the values; columns out of
            range or not ascending; a +0.0 among the values; two values of a 2:4 group in one place.
    """
    if packed.encoding not in ENCODINGS:
        raise BadInput(f"the encoding {packed.encoding!r:.40} is none of {', '.join(ENCODINGS)}.")
    if why := misfit(packed.encoding, packed.shape, packed.dtype):
        raise BadInput(f"shape {packed.shape} and {packed.dtype} cannot be {packed.encoding}: {why}.")
    wanted = forms(packed.encoding, packed.shape, packed.dtype)
    if set(wanted) != set(packed.parts):
        raise BadInput(f"{packed.encoding} has the parts {_listed(wanted)}; found {_listed(packed.parts)}.")
    for name, (dtype, shape) in wanted.items():
        part = packed.parts[name]
        if part.dtype != dtype or (part.ndim != 1 if shape is None else tuple(part.shape) != shape):
            found = f"{part.dtype} {tuple(part.shape)}"
            raise BadInput(f"{name} must be {dtype} {'(stored,)' if shape is None else shape}; found {found}.")
    if packed.encoding != "dense":
        count = count_stored(packed)
        for name, (_, shape) in wanted.items():
            if shape is None and len(packed.parts[name]) != count:
                raise BadInput(f"{count:,} elements are stored, and {name} has {len(packed.parts[name]):,}.")
        _check_values(packed)


def count_stored(packed: Packed) -> int:
    """How many values there must be, by the parts that say where they belong; their sizes must be right.

    Raises:
        BadInput: those parts contradict themselves.
    """
    rows, columns = packed.shape[0], math.prod(packed.shape[1:])
    if packed.encoding == "bitmask":
        bits = packed.parts["bits"]
        if columns % 8 and bool((bits[:, -1] >> columns % 8).any()):
            raise BadInput("bits are set past the last column.")
        return int(row_starts(bits, columns)[-1])
    if packed.encoding == "csr-u16":
        starts = packed.parts["starts"]
        ends = int(starts[0]), int(starts[-1])
        if ends[0] != 0 or not 0 <= ends[1] <= rows * columns or int(starts.min()) < 0 or int(starts.max()) > ends[1]:
            raise BadInput(f"starts must rise from 0 to the number of values; they go from {ends[0]} to {ends[1]}.")
        steps = starts.diff()
        if int(steps.min()) < 0 or int(steps.max()) > columns:
            raise BadInput(
                f"starts must rise by 0 to {columns:,} a row; found {int(steps.min())} to {int(steps.max())}."
            )
        return ends[1]
    places = packed.parts["places"]
    if not bool(_valid()[places.int()].all()):
        raise BadInput("a group of 2:4 must name two different places, the lower first.")
    return rows * columns // 2


def _check_values(packed: Packed) -> None:
    """Refuses columns that do not ascend or are out of range, and a +0.0 that need not be stored."""
    if packed.encoding == "csr-u16" and packed.count:
        columns, width = packed.parts["columns"].int(), math.prod(packed.shape[1:])
        if int(columns.max()) >= width:
            raise BadInput(f"a column is {int(columns.max()):,}, and there are {width:,}.")
        rises = columns.diff() > 0
        first = packed.parts["starts"][1:-1]
        rises[first[(first > 0) & (first < packed.count)] - 1] = True  # into another row
        if not bool(rises.all()):
            raise BadInput("the columns of a row must ascend.")
    words = packed.parts["values"].view({2: torch.int16, 4: torch.int32}[packed.dtype.itemsize])
    if packed.encoding != "2:4" and int(words.count_nonzero()) < packed.count:  # many times as fast as all()
        raise BadInput("a value is +0.0, which is what is not stored.")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "none"


def _fits(bits: Tensor) -> bool:
    """Whether no group of four has more than two bits set."""
    padded = _tables()[0]
    return bool(padded[bits.int()].all())  # padded bytes are never 0


@lru_cache
def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """For each byte of bits those of two places a group (0 where there are three or more), and their code; and back."""
    code = {(1 << p) | (1 << q): p | q << 2 for p, q in combinations(range(4), 2)}
    pairs = {}
    for nibble in range(16):
        fitting = [two for two in code if two & nibble == nibble]
        if fitting:
            pairs[nibble] = min(fitting)
    padded, places, back = (torch.zeros(256, dtype=torch.uint8, device="cpu") for _ in range(3))
    for low, low_pair in pairs.items():
        for high, high_pair in pairs.items():
            padded[low | high << 4] = low_pair | high_pair << 4
    for low, low_code in code.items():
        for high, high_code in code.items():
            places[low | high << 4] = low_code | high_code << 4
            back[low_code | high_code << 4] = low | high << 4
    return padded, places, back


def _valid() -> Tensor:
    """For each byte of places whether both groups name two different places in order."""
    return _tables()[2] != 0
