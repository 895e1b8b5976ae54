"""CRC-32 at the speed of memory, where the processor multiplies without carries; else zlib's own."""

from __future__ import annotations

import zlib

import numpy as np

from . import _kernels, available

_FAST = available() and _kernels().has_clmul()


def crc32(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """`zlib.crc32`, whoever computes it: of bytes that follow those of which ``value`` is the CRC-32.

    Args:
        data: contiguous bytes.
        value: of what comes before them.

    Example:
        >>> crc32(b"6789", crc32(b"12345")) == crc32(b"123456789") == 0xCBF43926
        True
    """
    if not _FAST:
        return zlib.crc32(data, value)
    held = np.frombuffer(data, np.uint8)
    found: int = _kernels().crc32(held.ctypes.data, len(held), value)
    return found
