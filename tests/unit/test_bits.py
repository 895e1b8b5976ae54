"""Masks of one bit a weight against NumPy: every dtype, native and torch, odd sizes, strides, NaN and -0.0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.core import bits as core_bits
from secateur.core.bits import count_kept, keep_, live_bits, pack, unpack
from secateur.core.keys import FORMATS
from tests.property.worlds import dtypes, example, going, routes

SIZES = (0, 1, 7, 8, 9, 31, 63, 64, 65, 257, 1003)


def raw(t: Tensor) -> Tensor:
    """The bits of every element, in logical order."""
    return t.detach().contiguous().view(FORMATS[t.dtype].view)


def mask_of(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("n", SIZES)
def test_packed_bits_are_numpys_little_endian_ones(n: int) -> None:
    keep = mask_of(n)
    assert np.array_equal(pack(keep).numpy(), np.packbits(keep.numpy(), bitorder="little"))
    assert count_kept(pack(keep)) == int(keep.sum())


@pytest.mark.parametrize("n", SIZES)
def test_any_range_comes_back(n: int) -> None:
    keep = mask_of(n)
    packed = pack(keep)
    for start in {0, 1, min(7, n), min(8, n), n // 2, n}:
        for count in {0, min(1, n - start), (n - start) // 2, n - start}:
            assert torch.equal(unpack(packed, start, count), keep[start : start + count]), (start, count)


def test_pack_takes_strides_and_goes_by_logical_order() -> None:
    keep = mask_of(35).view(5, 7).t()
    assert not keep.is_contiguous()
    assert np.array_equal(pack(keep).numpy(), np.packbits(keep.numpy().reshape(-1), bitorder="little"))


@routes
@dtypes
@pytest.mark.parametrize("fill", ["few values", "zeros", "normal", "any bits"])
def test_live_bits_are_the_elements_that_are_not_zero(route: tuple[str, int], dtype: torch.dtype, fill: str) -> None:
    with going(route):
        for n in SIZES:
            t = example((n,), dtype, fill)
            live = t.to(torch.float64).numpy() != 0
            assert np.array_equal(live_bits(t).numpy(), np.packbits(live, bitorder="little")), n


@routes
@dtypes
def test_keep_writes_positive_zero_and_leaves_every_other_bit(route: tuple[str, int], dtype: torch.dtype) -> None:
    with going(route):
        for n in SIZES:
            t, keep = example((n,), dtype, "few values"), mask_of(n)
            wanted = torch.where(keep, raw(t), torch.zeros_like(raw(t)))
            keep_(t, pack(keep))
            assert torch.equal(raw(t), wanted), n


@routes
@dtypes
def test_strided_tensors_go_by_logical_order(route: tuple[str, int], dtype: torch.dtype) -> None:
    with going(route):
        t, keep = example((9, 14), dtype, "few values").t(), mask_of(126).view(14, 9)
        assert torch.equal(unpack(live_bits(t), 0, 126).view(14, 9), t.to(torch.float64) != 0)
        wanted = torch.where(keep, raw(t), torch.zeros_like(raw(t)))
        keep_(t, pack(keep))
        assert torch.equal(raw(t), wanted)


@routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_nan_lives_unless_it_is_masked(route: tuple[str, int], dtype: torch.dtype) -> None:
    with going(route):
        t = torch.tensor([float("nan"), -float("nan"), float("inf"), -0.0, 0.0, -1, float("nan"), 2, -3], dtype=dtype)
        keep = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1, 0]).bool()
        assert unpack(live_bits(t), 0, 9).tolist() == [True, True, True, False, False, True, True, True, True]
        keep_(t, pack(keep))
        assert torch.isnan(t).tolist() == [True, *[False] * 8]
        assert t[1:].tolist() == [0, float("inf"), 0, 0, 0, 0, 2, 0]
        assert torch.signbit(t[1:]).tolist() == [False, False, True, *[False] * 5]  # a kept -0.0 is left as it is


@routes
def test_keep_stays_within_its_slice(route: tuple[str, int]) -> None:
    with going(route):
        base = torch.full((1000,), 3.0)
        keep_(base[17:900], pack(torch.zeros(883, dtype=torch.bool)))
        assert (base[17:900] == 0).all() and (base[:17] == 3).all() and (base[900:] == 3).all()


def test_the_torch_routine_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_bits, "CHUNK", 16)
    with going(("torch", 1)):
        keep, t = mask_of(1003), torch.ones(1003)
        assert np.array_equal(pack(keep).numpy(), np.packbits(keep.numpy(), bitorder="little"))
        keep_(t, pack(keep))
        assert torch.equal(t != 0, keep)


@routes
def test_autograd_sees_the_write(route: tuple[str, int]) -> None:
    with going(route):
        weight = torch.ones(9, requires_grad=True)
        out = (weight * weight).sum()
        keep_(weight, pack(mask_of(9)))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
