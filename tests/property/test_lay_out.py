"""Packed matrices between files and products: every way gives what `arrange` gives, and no part that lies goes through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core import lay_out as module
from secateur.core.lay_out import ENCODING, arranged, lay_out, restored
from secateur.core.layouts import LAYOUTS, PAD, Layout, Parts, arrange, restore
from secateur.core.packed import ENCODINGS, decode, encode, misfit
from secateur.core.parts import check
from secateur.errors import BadTensor, NotDefined
from tests.property.worlds import ROUTES, going

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 200))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    w = torch.randn(rows, columns, generator=g)
    w[torch.rand(rows, columns, generator=g) >= draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))] = 0
    if draw(st.booleans()):
        w[0, 0], w[-1, -1] = -0.0, float("nan")
    return w.to(draw(st.sampled_from(DTYPES)))


def same(a: Parts, b: Parts) -> bool:
    return all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def two_of_four(w: Tensor) -> Tensor:
    """As many columns as 2:4 needs, with at most two stored of four."""
    w = w[:, : w.shape[1] // 8 * 8].clone()
    w.view(-1, 4)[:, 2:] = 0
    return w


@pytest.mark.parametrize("route", ROUTES[::2], ids=lambda r: r[0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_is_laid_out_alike(encoding: str, layout: Layout, route: tuple[str, int]) -> None:
    @given(matrices(), st.sampled_from([1, 300, 1 << 22]))
    @settings(max_examples=25)
    def holds(w: Tensor, chunk: int) -> None:
        w = two_of_four(w) if encoding == "2:4" else w
        if misfit(encoding, tuple(w.shape), w.dtype):  # type: ignore[arg-type]
            return
        want = arrange(w, layout)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CHUNK", chunk)
            assert same(lay_out(encode(w, encoding), layout), want)  # type: ignore[arg-type]
        assert same(arranged(w, layout), want)
        back = restored(want, layout, w.shape[1])
        assert torch.equal(back.view(torch.uint8), w.contiguous().view(torch.uint8))
        assert (back.stride(), back.untyped_storage().nbytes()) == ((w.shape[1], 1), w.nbytes)
        check(want, layout, (w.shape[0], w.shape[1]))

    with going(route):
        holds()


@given(matrices(), st.sampled_from(LAYOUTS), st.data())
def test_parts_that_were_meddled_with_are_refused_or_mean_something(
    w: Tensor, layout: Layout, data: st.DataObject
) -> None:
    """Whatever byte is changed: it is refused, or it is the layout of another matrix, which comes back to the bit."""
    parts = tuple(t.clone() for t in arrange(w, layout))
    part = parts[data.draw(st.integers(0, 2))].view(-1).view(torch.uint8)
    if not part.numel():
        return
    at = data.draw(st.integers(0, part.numel() - 1))
    part[at] = data.draw(st.integers(0, 255))
    shape = w.shape[0], w.shape[1]
    try:
        check(parts, layout, shape)  # type: ignore[arg-type]
    except BadTensor:
        return
    _, values, starts = parts
    assert int(starts[-1]) == len(values) - PAD
    other = restore(parts, layout, shape[1])  # type: ignore[arg-type]
    count = int((other.view({2: torch.int16, 4: torch.int32}[other.itemsize]) != 0).sum())
    zeros = int((values[:-PAD].view({2: torch.int16, 4: torch.int32}[values.itemsize]) == 0).sum())
    assert count + zeros == len(values) - PAD
    if not zeros:
        assert same(arrange(other, layout), parts)  # type: ignore[arg-type]


def test_more_columns_than_16_bits_number() -> None:
    wide = torch.zeros(2, 65537)
    wide[1, 65536] = 3
    for make in (lambda: arranged(wide, "csr"), lambda: lay_out(encode(wide, "bitmask"), "csr")):
        with pytest.raises(NotDefined, match="65,536"):
            make()
    assert torch.equal(restore(arranged(wide, "bitmask"), "bitmask", 65537), wide)


@pytest.mark.parametrize("route", ROUTES[::2], ids=lambda r: r[0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_single_nan(dtype: torch.dtype, layout: Layout, route: tuple[str, int]) -> None:
    w = torch.zeros(3, 70, dtype=dtype)
    w.view({2: torch.int16, 4: torch.int32}[w.itemsize])[1, 4] = -1
    with going(route):
        for back in (
            restore(arranged(w, layout), layout, 70),
            restored(arranged(w, layout), layout, 70),
            decode(encode(w, ENCODING[layout])),
        ):
            assert torch.equal(back.view(torch.uint8), w.view(torch.uint8))
