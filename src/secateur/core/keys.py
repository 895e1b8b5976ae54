"""Scores as integers that keep the order, so that they can be counted, added and compared exactly.

For magnitude the key of ``w`` is the bit pattern of ``|w|``: for every IEEE-like format the order of these integers is the
order of the magnitudes, and ``0.0`` and ``-0.0`` are both 0. For any other score the key is the bit pattern made monotone
for signed numbers, and a weight that is zero gets the lowest key of all: zeros come first, whatever the criterion.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import BadTensor

CHUNK = 1 << 18
"""Elements looked at in one go by the torch routines; bounds their extra memory to some ten MiB."""


@dataclass(frozen=True)
class Format:
    """How a float dtype becomes a magnitude key: ``bits`` of key, first key that is not finite, integer view."""

    bits: int
    nonfinite: int
    view: torch.dtype
    signed_zero: bool = True

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return self.view.itemsize


FORMATS = {
    torch.float64: Format(63, 0x7FF << 52, torch.int64),
    torch.float32: Format(31, 0xFF << 23, torch.int32),
    torch.float16: Format(15, 0x1F << 10, torch.int16),
    torch.bfloat16: Format(15, 0xFF << 7, torch.int16),
    torch.float8_e5m2: Format(7, 0x7C, torch.uint8),
    torch.float8_e4m3fn: Format(7, 0x7F, torch.uint8),
    # The "fnuz" formats have no negative zero: its bit pattern is their only NaN.
    torch.float8_e5m2fnuz: Format(8, 0x80, torch.uint8, signed_zero=False),
    torch.float8_e4m3fnuz: Format(8, 0x80, torch.uint8, signed_zero=False),
}
"""Every dtype that can be pruned."""


_CODES = {torch.float64: ("<Q", "<d"), torch.float32: ("<I", "<f"), torch.float16: ("<H", "<e")}


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds all magnitudes exactly: the one there is, or float32, or float64.

    >>> common_dtype([torch.bfloat16, torch.float16])
    torch.float32
    """
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    return torch.float64 if torch.float64 in kinds else torch.float32


def bits_of(t: Tensor) -> Tensor:
    """The bit patterns as an integer tensor of the same width; a view where strides allow."""
    return t.detach().view(FORMATS[t.dtype].view)


def magnitude_key(t: Tensor) -> Tensor:
    """Integer keys (int64, same shape) whose order is the order of ``|t|``; zeros give 0, NaN the largest.

    >>> magnitude_key(torch.tensor([-0.0, 0.0, 1.0, -1.0, 2.0])).tolist()
    [0, 0, 1065353216, 1065353216, 1073741824]
    """
    f = FORMATS[t.dtype]
    bits = bits_of(t).to(torch.int64)
    if f.signed_zero:
        return bits & ((1 << f.bits) - 1)
    return torch.where(bits == 0x80, bits, bits & 0x7F)


def nonzero(t: Tensor) -> Tensor:
    """``t != 0``, NaN counting as nonzero; bool of the same shape. Floats by their bits: comparing them takes subnormal
    numbers for zero under ``torch.set_flush_denormal(True)``."""
    f = FORMATS.get(t.dtype)
    if f is None:
        return t.detach() != 0
    return (bits_of(t) & ((1 << f.bits) - 1 if f.signed_zero else 0xFF)) != 0


def key_value(key: int, dtype: torch.dtype) -> float:
    """The magnitude that a key stands for, as a Python float.

    >>> key_value(0x3F800000, torch.float32)
    1.0
    """
    if dtype == torch.bfloat16:
        return float(struct.unpack("<f", struct.pack("<I", key << 16))[0])
    if dtype in _CODES:
        whole, real = _CODES[dtype]
        return float(struct.unpack(real, struct.pack(whole, key))[0])
    return float(torch.tensor([key], dtype=torch.uint8).view(dtype).to(torch.float64)[0])


def key_at_least(value: float, dtype: torch.dtype) -> tuple[int, bool]:
    """The smallest key of ``dtype`` whose magnitude is >= ``value``, and whether it is exactly ``value``.

    >>> key_at_least(0.1, torch.float32) == (magnitude_key(torch.tensor(0.1)).item(), False)
    True
    """
    rounded = torch.tensor([value], dtype=torch.float64).to(dtype)
    key = int(magnitude_key(rounded)[0])
    got = float(rounded.to(torch.float64)[0])
    if got == value:
        return key, True
    return (key + 1 if got < value else key), False


def convert_cut(key: int, index: int, pool: torch.dtype, own: torch.dtype) -> tuple[int, int]:
    """A cut ``(key, index)`` found in the keys of ``pool``, in the keys of a tensor's ``own`` narrower dtype."""
    if pool == own:
        return key, index
    own_key, exact = key_at_least(key_value(key, pool), own)
    return own_key, (index if exact else 0)


LOWEST = -(1 << 63)
"""The order key of weights that are zero: below that of every score, minus infinity included."""

HIGHEST = (1 << 63) - 1
"""The order key of weights to be kept whatever their score: above that of every score, infinity included."""


def comparable(score: Tensor, what: str) -> Tensor:
    """Scores as float64, which holds every narrower float and every integer up to 2**53 exactly.

    Raises:
        BadTensor: scores that are not real, or integers too large; ``what`` names the tensor.
    """
    if score.dtype.is_complex or score.dtype == torch.bool:
        raise BadTensor(f"the criterion returned {score.dtype} scores for {what}: return real numbers.")
    if score.dtype == torch.int64 and bool(((score > 1 << 53) | (score < -(1 << 53))).any()):
        raise BadTensor(f"the criterion returned integers beyond 2**53 for {what}: scores are compared as float64.")
    return score.to(torch.float64)


def order_key(score: Tensor, what: str) -> Tensor:
    """Integer keys (int64, same shape) above `LOWEST` whose order is that of signed scores; -0.0 equals 0.0.

    Raises:
        BadTensor: scores that are NaN, not real, or integers too large to compare; ``what`` names the tensor.

    >>> order_key(torch.tensor([-1.0, -0.0, 0.0, 2.0]), "w").argsort(stable=True).tolist()
    [0, 1, 2, 3]
    """
    wide = comparable(score, what) + 0.0  # the sum turns -0.0 into 0.0
    if bool(torch.isnan(wide).any()):
        raise BadTensor(f"the criterion returned NaN for some weights of {what}: NaN has no order.")
    i = wide.view(torch.int64)
    return torch.where(i < 0, i ^ 0x7FFFFFFFFFFFFFFF, i)
