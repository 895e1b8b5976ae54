"""The codec loses nothing, and makes no more of a frame than a tensor can have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from secateur.core.packed import DTYPES, Packed, check, decode, encode
from secateur.errors import BadInput
from secateur.runtime.codec import compress, expand
from tests.property.test_packed import fitting, tensors, words

zstandard = pytest.importorskip("zstandard")


def coded(packed: Packed) -> Packed:
    return Packed(packed.encoding, packed.shape, packed.dtype, compress(packed))


@given(tensors())
def test_it_comes_back_to_the_bit(t: Tensor) -> None:
    for packed in fitting(t):
        there = coded(packed)
        assert all(p.dtype == torch.uint8 and p.ndim == 1 for p in there.parts.values())
        back = expand(there)
        check(back)
        assert all(torch.equal(words(back.parts[n]), words(p)) for n, p in packed.parts.items())
        assert torch.equal(words(decode(back)), words(t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes_are_what_the_page_says(dtype: torch.dtype) -> None:
    """All highest bytes of the words turned left by a bit, then the next ones; by numpy and zstandard alone."""
    values = torch.randn(1000).to(dtype)
    raw = compress(encode(values, "dense"))["values"].numpy().tobytes()
    plain = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read()
    width, unsigned = dtype.itemsize, f"<u{dtype.itemsize}"
    word = values.view(torch.uint8).numpy().view(unsigned)
    turned = word << 1 | word >> 8 * width - 1
    assert plain == turned.view(np.uint8).reshape(-1, width)[:, ::-1].T.tobytes()
    exponents = {float(v) for v in torch.frexp(values.double())[1]}
    if dtype != torch.float16:  # whose exponent has five bits
        assert len(set(plain[:1000])) == len(exponents)


def test_columns_and_starts_become_distances_and_counts() -> None:
    t = torch.zeros(3, 300)
    t[0, 7] = t[0, 19] = t[2, 299] = 1
    parts = compress(encode(t, "csr-u16"))

    def planes(name: str) -> bytes:
        raw = parts[name].numpy().tobytes()
        plain: bytes = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read()
        return plain

    assert planes("columns") == bytes([0, 0, 299 >> 8, 7, 12, 299 & 255])
    assert planes("starts") == bytes(21) + bytes([2, 0, 1])


def bombs() -> dict[str, bytes]:
    """Frames that claim, or make, more than they should; and what are no frames."""
    good = zstandard.ZstdCompressor().compress(bytes(range(8)) * 16)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))
    return {
        "too much": zstandard.ZstdCompressor().compress(bytes(1 << 24)), "too much, unsaid": unsized,
        "too little": zstandard.ZstdCompressor().compress(bytes(5)), "nothing": b"", "noise": b"not a frame at all",
        "cut short": good[: len(good) // 2], "a tail": good + b"tail", "one more": good + good,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(bombs()))
@pytest.mark.parametrize("part", ["bits", "values"])
def test_frames_of_other_sizes_are_refused(name: str, part: str) -> None:
    t = torch.randn(128, 8)
    t[:, ::2] = 0
    there = compress(encode(t, "bitmask"))
    raw = torch.frombuffer(bytearray(bombs()[name]), dtype=torch.uint8) if bombs()[name] else torch.empty(0).byte()
    with pytest.raises(BadInput, match=f"{part} "):
        expand(Packed("bitmask", (128, 8), torch.float32, {**there, part: raw}))


def test_counts_and_distances_that_lie_are_refused() -> None:
    t = torch.zeros(2, 40)
    t[0, 3] = t[1, 39] = 1
    compressor = zstandard.ZstdCompressor()

    def swapped(part: str, words_: list[int], width: int) -> Packed:
        raw = (
            np.array(words_, dtype=np.uint64)
            .astype(f"<u{width}")
            .view(np.uint8)
            .reshape(-1, width)[:, ::-1]
            .T.tobytes()
        )
        frame = torch.frombuffer(bytearray(compressor.compress(raw)), dtype=torch.uint8)
        return Packed("csr-u16", (2, 40), torch.float32, {**compress(encode(t, "csr-u16")), part: frame})

    for counts in ([41, 0], [2**64 - 1, 3], [2**63, 2**63], [2**62, 2**62]):
        with pytest.raises(BadInput, match="a row of 40 columns cannot store"):
            expand(swapped("starts", counts, 8))
    with pytest.raises(BadInput, match=r"columns must come to 4 bytes"):
        expand(swapped("columns", [1, 2, 3], 2))
    crowded = torch.ones(1, math.prod((40, 1000)))
    packed = compress(encode(crowded, "csr-u16"))
    far = np.full(40_000, 60_000, dtype="<u2").view(np.uint8).reshape(-1, 2)[:, ::-1].T.tobytes()
    packed["columns"] = torch.frombuffer(bytearray(compressor.compress(far)), dtype=torch.uint8)
    with pytest.raises(BadInput, match="a column is 2,400,000,000, which is more than 65,535"):
        expand(Packed("csr-u16", (1, 40_000), torch.float32, packed))
