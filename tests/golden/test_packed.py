"""Packed tensors small enough to check by eye: every byte of every part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.core.packed import Encoding, decode, encode

# Bits of a row are written from column 0 on: 2.0 in column 1 is bit 1, so 0b10.
MATRIX = [
    [0.0, 2.0, 0.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 5.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [3.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 1.0, 6.0, 0.0],
]
PAIRS = [
    [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0],  # places 0 1 and 2 3
    [0.0, 5.0, 0.0, 6.0, 0.0, 0.0, 0.0, 0.0],  # places 1 3 and, of nothing, 0 1
    [0.0, 0.0, 0.0, 7.0, 8.0, 0.0, 0.0, 0.0],  # places 0 3 and 0 1, each filled up with the lowest that is free
]

TABLE: list[tuple[Encoding, list[list[float]], dict[str, object]]] = [
    ("bitmask", MATRIX, {
        "bits": [[0b00010010, 0b10], [0, 0], [0b10001001, 0b01]],
        "values": [2.0, -0.0, 5.0, 3.0, 4.0, 1.0, 6.0],
    }),
    ("csr-u16", MATRIX, {
        "columns": [1, 4, 9, 0, 3, 7, 8], "starts": [0, 3, 3, 7], "values": [2.0, -0.0, 5.0, 3.0, 4.0, 1.0, 6.0],
    }),
    ("2:4", PAIRS, {
        # first place + 4 * second, the second group in the upper half
        "places": [[0b1110_0100], [0b0100_1101], [0b0100_1100]],
        "values": [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0], [0.0, 7.0, 8.0, 0.0]],
    }),
    ("dense", PAIRS, {"values": PAIRS}),
]  # fmt: skip


@pytest.mark.parametrize(("encoding", "matrix", "parts"), TABLE, ids=[t[0] for t in TABLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_by_eye(encoding: Encoding, matrix: list[list[float]], parts: dict[str, object], dtype: torch.dtype) -> None:
    t = torch.tensor(matrix, dtype=dtype)
    packed = encode(t, encoding)
    assert {n: p.tolist() for n, p in packed.parts.items()} == parts
    assert torch.equal(torch.signbit(packed.parts["values"].view(-1)), torch.signbit(of(parts, dtype)))
    assert torch.equal(decode(packed), t)
    assert torch.equal(torch.signbit(decode(packed)), torch.signbit(t))


def of(parts: dict[str, object], dtype: torch.dtype) -> Tensor:
    return torch.tensor(parts["values"], dtype=dtype).view(-1)


def test_bytes_by_eye() -> None:
    """64 rows of 128 in bf16: 16,384 bytes dense, 1,024 of bits, 4 of each column and value, 520 of starts."""
    for count, encoding, nbytes in (
        (8192, "dense", 16384), (7680, "dense", 16384), (7679, "bitmask", 1024 + 2 * 7679), (820, "bitmask", 1024 + 2 * 820),
        (252, "bitmask", 1024 + 2 * 252), (251, "csr-u16", 520 + 4 * 251), (0, "csr-u16", 520),
    ):  # fmt: skip
        t = torch.zeros(64 * 128, dtype=torch.bfloat16)
        t[:count] = 1
        packed = encode(t.view(64, 128))
        assert (packed.encoding, packed.nbytes) == (encoding, nbytes)


def test_a_convolution_is_seen_as_a_matrix() -> None:
    t = torch.zeros(2, 3, 2, 2)
    t[1, 2, 0, 1] = 9  # row 1, column 2 * 4 + 1
    assert encode(t, "csr-u16").parts["columns"].tolist() == [9]
    assert encode(t, "bitmask").parts["bits"].tolist() == [[0, 0], [0, 0b10]]
    assert torch.equal(decode(encode(t, "bitmask")), t)
