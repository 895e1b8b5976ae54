"""Every tensor comes back to the bit, from every encoding it fits, through native kernels and through torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur import native
from secateur.core import bit_rows
from secateur.core.packed import DTYPES, ENCODINGS, Encoding, Packed, check, decode, encode, forms, misfit, packable
from secateur.errors import NotDefined
from tests.property.worlds import going

FROM_NATIVE = pytest.mark.skipif(not native.available(), reason="built without the native kernels")
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 1.0)


def words(t: Tensor) -> Tensor:
    return t.contiguous().view(WORDS[t.element_size()])


@st.composite
def tensors(draw: st.DrawFn, packed: bool = False) -> Tensor:
    """Any bits at all, NaN, Inf and -0.0 among them, and a share of +0.0; sometimes strided, sometimes two of four."""
    least = 1 if packed else 0
    size = st.integers(least, 9) | st.sampled_from([16, 24, 63, 64, 65, 130])
    shape = draw(st.lists(size, min_size=2 * least, max_size=4).filter(lambda s: math.prod(s) <= 20_000))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    dtype = draw(st.sampled_from(DTYPES))
    n = math.prod(shape)
    t = torch.randint(-(2**62), 2**62, (n,), generator=g).to(WORDS[dtype.itemsize]).view(dtype)
    if draw(st.booleans()):
        t = torch.tensor(SPECIAL).to(dtype)[torch.randint(len(SPECIAL), (n,), generator=g)]
    t[torch.rand(n, generator=g) < draw(st.sampled_from([0, 0.02, 0.5, 0.9, 0.97, 1]))] = 0
    if n % 8 == 0 and draw(st.booleans()):
        t.view(-1, 4)[:, draw(st.sampled_from([[0, 1], [0, 3], [1, 2]]))] = 0
    t = t.view(shape)
    return t.transpose(0, -1) if t.ndim > 1 and draw(st.booleans()) else t


def fitting(t: Tensor) -> list[Packed]:
    """The tensor in every encoding that takes it."""
    found = []
    for encoding in ENCODINGS:
        try:
            found.append(encode(t, encoding))
        except NotDefined:
            assert encoding != "dense"
    return found


@given(tensors())
def test_it_comes_back_to_the_bit(t: Tensor) -> None:
    for packed in (encode(t), *fitting(t)):
        check(packed)
        back = decode(packed)
        assert (back.shape, back.dtype) == (t.shape, t.dtype)
        assert torch.equal(words(back), words(t)), packed.encoding
        assert set(packed.parts) == set(forms(packed.encoding, packed.shape, packed.dtype))


@given(tensors())
def test_the_smallest_is_chosen_and_dense_unless_another_is_smaller(t: Tensor) -> None:
    chosen, others = encode(t), fitting(t)
    assert chosen.nbytes == min(p.nbytes for p in others)
    if chosen.nbytes == t.numel() * t.element_size():
        assert chosen.encoding == "dense"
    if not packable(t):
        assert [p.encoding for p in others] == ["dense"]


@given(tensors(packed=True))
def test_a_fit_is_as_it_is_said(t: Tensor) -> None:
    """What the shape forbids is refused; of the rest only 2:4 can be, and only for what the weights are."""
    found = {p.encoding for p in fitting(t)}
    possible = {e for e in ENCODINGS if misfit(e, tuple(t.shape), t.dtype) is None}
    assert found <= possible
    assert possible - found <= {"2:4"}
    if "2:4" in possible:
        groups = (words(t).reshape(-1, 4) != 0).sum(1)
        assert ("2:4" in found) == bool((groups <= 2).all())


@FROM_NATIVE
@given(tensors(packed=True), st.integers(1, 2))
def test_kernels_and_torch_agree(t: Tensor, threads: int) -> None:
    for encoding in ENCODINGS:
        if misfit(encoding, tuple(t.shape), t.dtype):
            continue
        answers = []
        for kind in ("native", "torch"):
            with going((kind, threads)):
                try:
                    packed = encode(t, encoding)
                except NotDefined as e:
                    answers.append(str(e))
                    continue
                check(packed)
                answers.append(
                    {n: words(p).tolist() for n, p in packed.parts.items()} | {"": words(decode(packed)).tolist()}
                )
        assert answers[0] == answers[1]


@given(tensors(packed=True))
def test_the_parts_are_what_the_page_says(t: Tensor) -> None:
    """By numpy alone, from the words of the docstring."""
    matrix = words(t).reshape(len(t), -1).numpy()
    kept = matrix != 0
    bitmask = encode(t, "bitmask").parts
    assert np.array_equal(bitmask["bits"].numpy(), np.packbits(kept, axis=1, bitorder="little"))
    assert np.array_equal(words(bitmask["values"]).numpy(), matrix[kept])
    csr = encode(t, "csr-u16").parts
    assert np.array_equal(csr["columns"].numpy(), np.nonzero(kept)[1])
    assert np.array_equal(csr["starts"].numpy(), np.concatenate([[0], np.cumsum(kept.sum(1))]))
    assert np.array_equal(words(csr["values"]).numpy(), matrix[kept])
    if any(p.encoding == "2:4" for p in fitting(t)):
        pairs = encode(t, "2:4").parts
        places = pairs["places"].numpy()
        codes = np.stack([places & 15, places >> 4], -1).reshape(len(t), -1)
        out = np.zeros_like(matrix).reshape(len(t), -1, 4)
        values = words(pairs["values"]).numpy().reshape(len(t), -1, 2)
        for at in (0, 1):
            np.put_along_axis(out, (codes >> 2 * at & 3)[..., None], values[..., at : at + 1], -1)
        assert np.array_equal(out.reshape(matrix.shape), matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("encoding", [None, "dense"])
def test_other_dtypes_are_dense(dtype: torch.dtype, encoding: Encoding | None) -> None:
    t = torch.zeros(4, 8).to(dtype)
    packed = encode(t, encoding)
    check(packed)
    assert packed.encoding == "dense"
    assert decode(packed).data_ptr() == t.data_ptr()
    with pytest.raises(NotDefined, match=r"cannot be bitmask: only float32, bfloat16 and float16"):
        encode(t, "bitmask")


def test_columns_are_counted_to_65536_and_no_further() -> None:
    wide = torch.zeros(1, 1 << 16)
    wide[0, -1] = 1
    packed = encode(wide)
    assert (packed.encoding, packed.parts["columns"].tolist()) == ("csr-u16", [65535])
    assert torch.equal(decode(packed), wide)
    with pytest.raises(NotDefined, match="at most 65,536, and it has 65,537"):
        encode(torch.zeros(1, (1 << 16) + 1), "csr-u16")
    assert encode(torch.zeros(1, (1 << 16) + 1)).encoding == "bitmask"


def test_memory_is_made_on_the_cpu_whatever_the_default() -> None:
    t = torch.zeros(8, 64)
    t[3, 5] = 1
    with torch.device("meta"):
        assert all(torch.equal(decode(p), t) for p in fitting(t))


@FROM_NATIVE
def test_kernels_never_look_past_the_last_column() -> None:
    """Bits there are ignored, as by torch, so that no column past the end is read or written."""
    t = torch.ones(3, 5)
    bits = torch.full((3, 1), 0xFF, dtype=torch.uint8)
    for kind in ("native", "torch"):
        with going((kind, 1)):
            assert bit_rows.row_starts(bits, 5).tolist() == [0, 5, 10, 15]
            assert bit_rows.collect(t, bits).tolist() == [1] * 15
            assert torch.equal(bit_rows.spread(torch.ones(15), bits, 5), t)
            assert bit_rows.columns_of(bits, 5).tolist() == [0, 1, 2, 3, 4] * 3


@FROM_NATIVE
def test_kernels_refuse_what_does_not_fit_in_their_memory() -> None:
    bits = torch.full((3, 1), 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="6 bits are set, and there are 5 values"):
        native.packing.spread(torch.ones(5), bits, 8)
    with pytest.raises(ValueError, match="9 columns have 2 bytes of bits"):
        native.packing.spread(torch.ones(6), bits, 9)
    with pytest.raises(ValueError, match="a matrix of 2 rows has as many rows of bits; got 3"):
        native.packing.collect(torch.ones(2, 8), bits)
    with pytest.raises(ValueError, match="columns are listed in 16 bits; got 65537"):
        native.packing.list_columns(torch.zeros(1, 8193, dtype=torch.uint8), 65537)
    with pytest.raises(ValueError, match="matrices of elements of 2 or 4 bytes are packed"):
        native.packing.mark(torch.ones(2, 2, dtype=torch.float64))
