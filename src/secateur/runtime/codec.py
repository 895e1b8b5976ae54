"""The lossless codec of packed files: bytes of equal weight side by side, then zstd.

Pruning leaves few exponents, and no order in the mantissas: apart from each other the first need hardly more than one bit
a weight, the others cannot be compressed, and zstd sees at once that they cannot. So the words of a part are cut into
*planes*, all their highest bytes, then all the next ones. Floats are turned left by one bit before, so that the whole
exponent is in the highest byte and the sign is with the mantissa. Where values begin becomes how many each row has, and a
column becomes its distance from the one before it in its row. A plane is a zstd frame; a part is its frames, one after
another.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.core.packed import Packed, count_stored, forms
from secateur.errors import BadInput, SecateurError

Words = NDArray[Any]
Bytes = NDArray[np.uint8]

LEVEL = 1
"""Of zstd. What it leaves is already close to what is known of the bits; 15 takes thirty times as long for 3 % less."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def zstd() -> ModuleType:
    """The package behind the codec.

    Raises:
        SecateurError: it is not installed.
    """
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]
    except ImportError as e:
        raise SecateurError('the codec zstd needs a package more: pip install "secateur[zstd]".') from e
    return zstandard


def compress(packed: Packed) -> dict[str, Tensor]:
    """The parts of a tensor as uint8, smaller; dense ones only of `FLOATS`.

    Raises:
        SecateurError: ``zstandard`` is not installed.
    """
    compressor = zstd().ZstdCompressor(level=LEVEL)
    out = {}
    for name, part in packed.parts.items():
        words = _words(part)
        if name == "starts":
            words = np.diff(words)
        elif name == "columns":
            words = _steps(words, packed.parts["starts"].numpy())
        frames = [compressor.compress(plane) for plane in _planes(words, part.dtype in FLOATS)]
        out[name] = torch.from_numpy(np.frombuffer(bytearray(b"".join(frames)), dtype=np.uint8))
    return out


def expand(packed: Packed) -> Packed:
    """The way back: from parts that `compress` made. What comes out has the right sizes, and is still to be checked.

    The size of each part follows from the shape, then from those before it; no more than that is ever made of one.

    Raises:
        BadInput: a part that is no frames of zstd, or frames of other sizes.
        SecateurError: ``zstandard`` is not installed.
    """
    parts: dict[str, Tensor] = {}
    out = Packed(packed.encoding, packed.shape, packed.dtype, parts)
    count = 0
    for at, (name, (dtype, shape)) in enumerate(forms(packed.encoding, packed.shape, packed.dtype).items()):
        if at == 1:
            count = count_stored(out)
        shape = (count,) if shape is None else shape
        if name == "starts":
            parts[name] = _starts(_expanded(packed.parts[name], name, dtype, (shape[0] - 1,)), packed)
        elif name == "columns":
            parts[name] = _columns(_expanded(packed.parts[name], name, dtype, shape), parts["starts"])
        else:
            parts[name] = _expanded(packed.parts[name], name, dtype, shape)
    return out


def _words(t: Tensor) -> Words:
    """The bits of a tensor as unsigned integers, flat."""
    raw = t.reshape(-1).view(torch.uint8).numpy()
    return raw.view(f"<u{t.element_size()}")


def _planes(words: Words, floats: bool) -> list[Bytes]:
    """All highest bytes, all second highest, and so on."""
    width = words.itemsize
    if floats:
        words = words << 1 | words >> 8 * width - 1
    return [(words >> 8 * i).astype(np.uint8) for i in reversed(range(width))]


def _expanded(raw: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A part of a known size from its frames."""
    width = dtype.itemsize
    out = torch.empty(shape, dtype=dtype, device="cpu")
    words = _words(out)
    planes = _frames(raw, name, width, len(words))
    words[:] = planes[0]
    for plane in planes[1:]:
        words <<= 8
        words |= plane
    if dtype in FLOATS:
        words[:] = words >> 1 | words << 8 * width - 1
    return out


def _frames(raw: Tensor, name: str, planes: int, size: int) -> Bytes:
    """So many planes of so many bytes each, uint8 ``(planes, size)``."""
    zstandard = zstd()
    out = np.empty((planes, size), dtype=np.uint8)
    reader = zstandard.ZstdDecompressor().stream_reader(raw.numpy(), read_across_frames=True)
    try:
        got = 0
        while got < out.nbytes and (more := reader.readinto(out.reshape(-1)[got:])):
            got += more
        whole = got == out.nbytes and not reader.read(1)
    except zstandard.ZstdError as e:
        raise BadInput(f"{name} is not {planes} frames of zstd: {e}.") from e
    if not whole:
        raise BadInput(
            f"{name} must come to {out.nbytes:,} bytes; zstd makes {'more' if got == out.nbytes else got} of it."
        )
    return out


def _steps(columns: Words, starts: NDArray[np.int64]) -> Words:
    """Of each column the distance from the one before it in its row; the first of a row as it is."""
    steps = columns.copy()
    steps[1:] -= columns[:-1]
    first = starts[:-1][starts[:-1] < len(columns)]
    steps[first] = columns[first]
    return steps


def _columns(steps: Tensor, starts: Tensor) -> Tensor:
    """The way back from `_steps`.

    Raises:
        BadInput: a column that 16 bits do not hold.
    """
    total = steps.to(torch.int64).cumsum(0)
    before = torch.cat([total.new_zeros(1), total])[starts[:-1]]
    columns = total - torch.repeat_interleave(before, starts.diff())
    if len(columns) and int(columns.max()) > 0xFFFF:
        raise BadInput(f"a column is {int(columns.max()):,}, which is more than 65,535.")
    return columns.to(torch.uint16)


def _starts(counts: Tensor, packed: Packed) -> Tensor:
    """Where the values of each row begin, from how many it has.

    Raises:
        BadInput: a row that has more than there are columns, or fewer than none.
    """
    columns = math.prod(packed.shape[1:])
    if int(counts.min()) < 0 or int(counts.max()) > columns:
        raise BadInput(f"a row of {columns:,} columns cannot store {int(counts.max()):,}.")
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
