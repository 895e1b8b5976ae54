"""Products with packed matrices agree with float64 to the accuracy of dense, by every method and instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from secateur import native
from secateur.core.layouts import LAYOUTS, Layout, arrange
from secateur.core.products import Method, product
from secateur.native import products as kernels
from secateur.runtime.timing import threads

METHODS = get_args(Method)
ACCURACY = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of an output, in units of the sum of the magnitudes that were added up."""

pytestmark = pytest.mark.skipif(not native.available(), reason="without compiled kernels the matrix is made whole")


@pytest.fixture(params=kernels.isas() if native.available() else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(before)


def drawn(
    rows: int, columns: int, n: int, density: float, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * (torch.rand(rows, columns, generator=g) < density)
    x, bias = torch.randn(n, columns, generator=g), torch.randn(rows, generator=g)
    return weight.to(dtype), x.to(dtype), bias.to(dtype)


def off(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The largest error, in units of the sum of magnitudes."""
    wide, x = weight.double(), x.double()
    added = 0.0 if bias is None else bias.double()
    size = x.abs() @ wide.abs().T + (0.0 if bias is None else bias.double().abs())
    return float(((y.double() - (x @ wide.T + added)).abs() / size.clamp_min(1e-30)).max()) if y.numel() else 0.0


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70), columns=st.integers(1, 300), n=st.integers(0, 40), density=st.sampled_from([0, 0.02, 0.3, 0.9, 1]),
    dtype=st.sampled_from([*ACCURACY]), layout=st.sampled_from(LAYOUTS), method=st.sampled_from(METHODS),
    biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_that_they_agree_with_float64(
    rows: int,
    columns: int,
    n: int,
    density: float,
    dtype: torch.dtype,
    layout: Layout,
    method: Method,
    biased: bool,
    seed: int,
) -> None:
    weight, x, bias = drawn(rows, columns, n, density, dtype, seed)
    added = bias if biased else None
    before = kernels.isa()
    try:
        for name in kernels.isas():
            kernels.use_isa(name)
            y = product(x, arrange(weight, layout), layout, columns, added, method)
            assert y.shape == (n, rows) and y.dtype == dtype
            assert off(y, x, weight, added) <= ACCURACY[dtype], name
    finally:
        kernels.use_isa(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ACCURACY)
def test_long_rows_many_inputs_and_more_than_one_panel(
    isa: str, dtype: torch.dtype, layout: Layout, method: Method
) -> None:
    weight, x, bias = drawn(37, 9000, 197, 0.1, dtype, 1)
    assert off(product(x, arrange(weight, layout), layout, 9000, bias, method), x, weight, bias) <= ACCURACY[dtype]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ACCURACY)
def test_nan_and_infinity_give_what_dense_gives(isa: str, dtype: torch.dtype, layout: Layout, method: Method) -> None:
    """Zero times infinity is NaN, also where the zero is not stored."""
    weight, x, _ = drawn(9, 130, 6, 0.3, dtype, 2)
    x[1, 7], x[3, 129], x[4, 0] = torch.nan, torch.inf, -torch.inf
    weight[:, 129] = weight[:, 129].abs() + 1
    dense, found = F.linear(x, weight), product(x, arrange(weight, layout), layout, 130, None, method)
    assert dense.isnan().any() and dense.isinf().any()
    assert torch.equal(found.isnan(), dense.isnan()) and torch.equal(found.isinf(), dense.isinf())
    assert torch.equal(found[dense.isinf()], dense[dense.isinf()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_no_bit(isa: str, layout: Layout, method: Method) -> None:
    weight, x, bias = drawn(700, 900, 21, 0.2, torch.float32, 3)
    parts = arrange(weight, layout)
    with threads(1):
        one = product(x, parts, layout, 900, bias, method)
    with threads(4):
        assert torch.equal(one, product(x, parts, layout, 900, bias, method))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extremes(isa: str, layout: Layout) -> None:
    """A matrix of nothing, one of everything, the smallest and the largest halves, and a sum that overflows a half."""
    for weight in (torch.zeros(5, 70), torch.ones(5, 70), torch.tensor([[2.0**-24] * 3, [65504.0, 65504.0, 0.0]])):
        half = weight.half()
        x = torch.ones(2, weight.shape[1], dtype=torch.float16)
        for method in METHODS:
            assert torch.equal(
                product(x, arrange(half, layout), layout, weight.shape[1], None, method), F.linear(x, half)
            )
