"""Integers that keep the order of floats: magnitudes of every dtype, signed scores, and cuts carried between dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.core.keys import (
    FORMATS,
    LOWEST,
    bits_of,
    common_dtype,
    convert_cut,
    key_at_least,
    key_value,
    magnitude_key,
    nonzero,
    order_key,
)
from secateur.errors import BadTensor
from tests.property.worlds import DTYPES, dtypes

SMALL = [d for d in DTYPES if d.itemsize <= 2]


def every(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of a dtype of at most 16 bits; of wider ones some thousands, the ends of the range among them."""
    view = FORMATS[dtype].view
    if dtype.itemsize <= 2:
        return torch.arange(2 ** (8 * dtype.itemsize)).to(view).view(dtype)
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (5000,), generator=g) >> (64 - 8 * dtype.itemsize)
    top = (1 << FORMATS[dtype].bits) - 1
    ends = torch.tensor([0, 1, 2, FORMATS[dtype].nonfinite - 1, FORMATS[dtype].nonfinite, top, -1 - top, -top])
    return torch.cat([drawn, ends]).to(view).view(dtype)


@dtypes
def test_keys_order_magnitudes(dtype: torch.dtype) -> None:
    t = every(dtype)
    keys, size = magnitude_key(t), t.to(torch.float64).abs()
    finite = torch.isfinite(size)
    f = FORMATS[dtype]
    assert keys.dtype == torch.int64 and int(keys.min()) == 0 and int(keys.max()) < 1 << f.bits
    assert torch.equal(keys < f.nonfinite, finite)
    assert torch.equal(keys == 0, size == 0) and torch.equal(nonzero(t), size != 0)
    order = torch.argsort(size[finite], stable=True)
    steps, grows = keys[finite][order].diff(), size[finite][order].diff()
    assert torch.equal(steps > 0, grows > 0) and bool((steps >= 0).all())
    infinite, nan = keys[torch.isinf(size)], keys[torch.isnan(size)]
    assert not infinite.numel() or not nan.numel() or int(infinite.max()) < int(nan.min())


@pytest.fixture
def flushed() -> Iterator[None]:
    """Subnormal numbers are taken for zero in float arithmetic and comparisons."""
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushed")
def test_subnormal_numbers_are_not_zero() -> None:
    for dtype, bits in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        t = torch.tensor([[70000, 0]], dtype=bits).view(dtype)
        live = secateur.masks({"a.weight": t})["a.weight"]
        assert live.tolist() == [[True, False]]
        assert secateur.inspect({"a.weight": t}).zeros == int((~live).sum())


@dtypes
def test_a_key_says_its_magnitude(dtype: torch.dtype) -> None:
    t = every(dtype)[:: 1 if dtype.itemsize == 1 else 97]
    for key, size in zip(magnitude_key(t).tolist(), t.to(torch.float64).abs().tolist(), strict=True):
        got = key_value(key, dtype)
        assert got == size or (math.isnan(got) and math.isnan(size))


@dtypes
def test_keys_of_strided_and_empty_tensors(dtype: torch.dtype) -> None:
    t = every(dtype)[:240].view(12, 20)
    assert torch.equal(magnitude_key(t.t()), magnitude_key(t).t())
    assert torch.equal(magnitude_key(t[::2, 1::3]), magnitude_key(t)[::2, 1::3])
    assert magnitude_key(t[:0]).shape == (0, 20) and magnitude_key(t[0, 0]).dim() == 0
    assert bits_of(t).data_ptr() == t.data_ptr()


@dtypes
@settings(max_examples=150)
@given(st.data())
def test_the_first_key_at_or_above_a_value(dtype: torch.dtype, data: st.DataObject) -> None:
    """Of random values, and of values next to the dtype's own, on either side."""
    value = data.draw(st.floats(0, 1e308, exclude_min=True) | st.floats(1e-9, 1e3))
    if data.draw(st.booleans()):
        own = key_value(data.draw(st.integers(1, FORMATS[dtype].nonfinite - 1)), dtype)
        near = [own, math.nextafter(own, 0), math.nextafter(own, math.inf)]
        value = data.draw(st.sampled_from([v for v in near if 0 < v < math.inf]))
    key, exact = key_at_least(value, dtype)
    assert 0 <= key <= FORMATS[dtype].nonfinite
    assert exact == (key < FORMATS[dtype].nonfinite and key_value(key, dtype) == value)
    assert key == FORMATS[dtype].nonfinite or key_value(key, dtype) >= value
    assert key == 0 or key_value(key - 1, dtype) < value


def test_the_dtype_that_holds_all() -> None:
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    assert common_dtype([bf16, bf16]) == bf16
    assert common_dtype([torch.float8_e4m3fnuz]) == torch.float8_e4m3fnuz
    for mixed in ([bf16, fp16], [torch.float8_e4m3fn, torch.float8_e5m2], [fp32, bf16]):
        assert common_dtype(mixed) == fp32
    assert common_dtype([fp32, fp64]) == fp64 and common_dtype([torch.float8_e5m2, fp64]) == fp64


@pytest.mark.parametrize("pool", [torch.float32, torch.float64], ids=str)
@dtypes
@settings(max_examples=60)
@given(st.data())
def test_a_cut_means_the_same_in_another_dtype(dtype: torch.dtype, pool: torch.dtype, data: st.DataObject) -> None:
    """Whatever falls below (key, index) in the keys of the pool does so in the tensor's own, and nothing else."""
    if dtype.itemsize > pool.itemsize:
        pool = torch.float64
    t = every(dtype)
    t = t[torch.isfinite(t.to(torch.float64))][:: 1 if dtype.itemsize == 1 else 13]
    wide = magnitude_key(t.to(pool))
    near = int(wide[data.draw(st.integers(0, t.numel() - 1))])
    key = max(0, near + data.draw(st.sampled_from([-1, 0, 0, 1])))
    index = data.draw(st.integers(0, t.numel()))
    own_key, own_index = convert_cut(key, index, pool, dtype)
    at, keys = torch.arange(t.numel()), magnitude_key(t)
    meant = (wide < key) | ((wide == key) & (at < index))
    assert torch.equal((keys < own_key) | ((keys == own_key) & (at < own_index)), meant)


@example([0.0, -0.0, 1.0, -5e-324, -math.inf, math.inf])
@given(st.lists(st.floats(allow_nan=False), max_size=40))
def test_order_keys_are_monotone(values: list[float]) -> None:
    keys = order_key(torch.tensor(values, dtype=torch.float64), "w")
    for a, x in zip(keys.tolist(), values, strict=True):
        assert a > LOWEST
        for b, y in zip(keys.tolist(), values, strict=True):
            assert (a < b) == (x < y) and (a == b) == (x == y)


def test_scores_that_have_no_order() -> None:
    with pytest.raises(BadTensor, match=r"NaN for some weights of 'fc'"):
        order_key(torch.tensor([1.0, math.nan]), "'fc'")
    with pytest.raises(BadTensor, match="complex64"):
        order_key(torch.tensor([1j]), "'fc'")
    with pytest.raises(BadTensor, match="bool"):
        order_key(torch.tensor([True]), "'fc'")
    for n in (2**53 + 1, -(2**53) - 1, -(2**63)):
        with pytest.raises(BadTensor, match=r"2\*\*53"):
            order_key(torch.tensor([n]), "'fc'")
    assert order_key(torch.tensor([2**53, -(2**53)]), "w").argsort().tolist() == [1, 0]
