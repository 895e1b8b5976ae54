"""Masks of one bit a weight: row-major, of each byte the lowest bit first, 1 = keep."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from secateur import native

from . import fast
from .keys import nonzero

CHUNK = 1 << 23
"""Elements whose mask is unpacked at a time by the torch routines; a multiple of 8."""


@lru_cache
def _places(device: torch.device) -> Tensor:
    """The value of each bit of a byte; made once, since every copy to a GPU waits for it."""
    return torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=device)


@lru_cache
def _ones(device: torch.device) -> Tensor:
    """How many bits are set in each value of a byte."""
    return torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int64, device=device)


def pack(keep: Tensor) -> Tensor:
    """A keep-mask (bool, any shape) as packed bits (uint8, on the same device); unused bits are 0."""
    flat = keep.reshape(-1)
    rest = -flat.numel() % 8
    if rest:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    places = _places(flat.device)
    packed = torch.empty(flat.numel() // 8, dtype=torch.uint8, device=flat.device)
    for at in range(0, packed.numel(), CHUNK):
        some = flat[8 * at : 8 * (at + CHUNK)].view(-1, 8)
        torch.sum(some * places, dim=1, dtype=torch.uint8, out=packed[at : at + CHUNK])
    return packed


def unpack(bits: Tensor, start: int, count: int) -> Tensor:
    """``count`` flat elements of a keep-mask from packed bits, from flat index ``start``; bool, on the same device."""
    first = start // 8
    raw = bits[first : (start + count + 7) // 8]
    return ((raw.unsqueeze(1) & _places(raw.device)) != 0).view(-1)[start - 8 * first :][:count]


def zero_(t: Tensor, where: Tensor) -> None:
    """Writes +0.0 where the mask says; never by multiplication, which keeps NaN and makes -0.0."""
    t = t.detach()
    if t.dtype.itemsize == 1:  # torch has no masked_fill_ for 8-bit floats
        t = t.view(torch.uint8)
    t.masked_fill_(where, 0)


def live_bits(t: Tensor) -> Tensor:
    """The mask of a tensor's elements that are not zero; NaN is not."""
    t = t.detach()
    if not fast.seen(t):
        return pack(nonzero(t))
    bits = torch.empty((t.numel() + 7) // 8, dtype=torch.uint8)
    native.live(t, bits)
    return bits


def keep_(t: Tensor, bits: Tensor) -> None:
    """Writes +0.0, in place, over the elements whose bit is 0; ``bits`` on the tensor's device."""
    t = t.detach()
    if fast.seen(t):
        native.keep(t, bits)
        torch.autograd.graph.increment_version(t)
    elif t.is_contiguous():
        for at in range(0, t.numel(), CHUNK):
            some = t.view(-1)[at : at + CHUNK]
            zero_(some, ~unpack(bits, at, some.numel()))
    else:
        zero_(t, ~unpack(bits, 0, t.numel()).view(t.shape))


def count_kept(bits: Tensor) -> int:
    """How many bits are set."""
    return int((torch.bincount(bits.to(torch.int64), minlength=256) * _ones(bits.device)).sum())
