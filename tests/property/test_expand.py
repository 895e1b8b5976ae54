"""A matrix that is made whole for torch's product: the same bits, and products as accurate as dense, panel by panel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from secateur import native
from secateur.core import expand
from secateur.core.expand import expanded
from secateur.core.layouts import LAYOUTS, Layout, arrange
from secateur.native import products as kernels
from tests.property.test_products import ACCURACY, drawn, off

ISAS = kernels.isas() if native.available() else [None]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40), columns=st.integers(1, 300), n=st.integers(0, 40), density=st.sampled_from([0, 0.02, 0.3, 1]),
    dtype=st.sampled_from([*ACCURACY]), layout=st.sampled_from(LAYOUTS), panel=st.sampled_from([1, 5000, 1 << 21]),
    biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_that_it_agrees_with_float64(
    rows: int, columns: int, n: int, density: float, dtype: torch.dtype, layout: Layout, panel: int, biased: bool, seed: int
) -> None:  # fmt: skip
    weight, x, bias = drawn(rows, columns, n, density, dtype, seed)
    added = bias if biased else None
    before = kernels.isa() if native.available() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand, "PANEL", panel)
        try:
            for name in ISAS:
                if name is not None:
                    kernels.use_isa(name)
                y = expanded(x, arrange(weight, layout), layout, columns, added)
                assert y.shape == (n, rows)
                assert y.dtype == dtype
                assert off(y, x, weight, added) <= ACCURACY[dtype], name
        finally:
            if before is not None:
                kernels.use_isa(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ACCURACY)
def test_without_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layout: Layout) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(expand, "PANEL", 5000)
    weight, x, bias = drawn(37, 200, 7, 0.3, dtype, 1)
    assert off(expanded(x, arrange(weight, layout), layout, 200, bias), x, weight, bias) <= ACCURACY[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_give_what_dense_gives(layout: Layout) -> None:
    weight, x, _ = drawn(9, 130, 6, 0.3, torch.float32, 2)
    x[1, 7], x[3, 129], x[4, 0] = torch.nan, torch.inf, -torch.inf
    dense, found = F.linear(x, weight), expanded(x, arrange(weight, layout), layout, 130)
    assert dense.isnan().any()
    assert torch.equal(found.isnan(), dense.isnan())
    assert torch.equal(found[dense.isinf()], dense[dense.isinf()])


@pytest.mark.skipif(not native.available(), reason="there is no kernel")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ACCURACY)
def test_made_whole_to_the_bit(dtype: torch.dtype, layout: Layout) -> None:
    """-0.0 and infinity too; widened to float32 where the kernels multiply that; from any row on, and no row past the last."""
    weight, _, _ = drawn(21, 100, 1, 0.4, dtype, 3)
    weight[3, 0], weight[4, 99], weight[5, 7] = -0.0, torch.inf, -0.0
    parts, before = arrange(weight, layout), kernels.isa()
    try:
        for name in kernels.isas():
            kernels.use_isa(name)
            kind = kernels.whole_dtype(dtype)
            room = torch.full((30, 128), 9.0, dtype=kind)
            found = kernels.whole(layout == "bitmask", *parts, 100, 2, 15, room)
            assert torch.equal(found.to(dtype), weight[2:17])
            assert torch.equal(found.signbit(), weight[2:17].signbit())
            assert (room[15:] == 9).all()
    finally:
        kernels.use_isa(before)


@pytest.mark.skipif(not native.available(), reason="there is no kernel")
def test_what_does_not_fit_is_refused() -> None:
    parts = arrange(torch.ones(4, 10), "bitmask")
    room = torch.empty(4, 64)
    for first, count, out in ((0, 5, room), (3, 2, room), (-1, 2, room), (0, 4, room[:3]), (0, 2, torch.empty(4, 32)),
                              (0, 2, room.double()), (0, 2, torch.empty(64, 4).t())):  # fmt: skip
        with pytest.raises(ValueError, match=r"do not go into|contiguous"):
            kernels.whole(True, *parts, 10, first, count, out)
    with pytest.raises(ValueError, match="do not go into"):
        kernels.whole(False, *parts, 10, 0, 4, room)
