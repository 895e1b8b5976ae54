"""The fast CRC-32 is zlib's, however the bytes are cut and wherever they begin."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.native import checksum
from secateur.native.checksum import crc32


@given(st.binary(max_size=700), st.integers(0, 700), st.integers(0, 15), st.integers(0, 2**32 - 1))
def test_of_pieces_that_begin_anywhere(data: bytes, at: int, offset: int, before: int) -> None:
    moved = memoryview(bytearray(offset) + data)[offset:]
    assert crc32(moved[at:], crc32(moved[:at], before)) == zlib.crc32(data, before)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 63, 64, 65, 127, 128, 1 << 20, (1 << 20) + 77])
def test_of_every_kind_of_buffer(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    for held in (data.tobytes(), bytearray(data), memoryview(data), data.data):
        assert crc32(held) == zlib.crc32(held)


def test_without_the_kernels_it_is_zlib_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_FAST", False)
    assert crc32(b"6789", crc32(b"12345")) == 0xCBF43926
