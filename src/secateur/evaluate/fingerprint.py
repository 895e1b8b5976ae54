"""A number for what a model holds, to tell whether it is still the same one. It guards against slips, not against malice."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from secateur.native.checksum import crc32
from secateur.stores.checks import is_plain


def sums_of(model: nn.Module) -> dict[str, int]:
    """The CRC-32 of every tensor of a model's state, by name: of its type, its shape, and its bytes where it has some."""
    return {name: _sum(t) for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def digest(sums: dict[str, int]) -> str:
    """All sums in one text of 16 letters.

    >>> digest({"weight": 1}) == digest({"weight": 1}), digest({"weight": 1}) == digest({"weight": 2})
    (True, False)
    """
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16]


def _sum(t: Tensor) -> int:
    start = crc32(f"{t.dtype} {t.layout}".encode())
    if not is_plain(t) or t.is_quantized:
        return start
    start = crc32(str(tuple(t.shape)).encode(), start)
    values = t.contiguous().reshape(-1)
    return crc32(values.view(torch.uint8).cpu().numpy().data, start) if values.numel() else start
