"""SparseGPT against its meaning, against magnitude where they must agree, and its counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.patterns import NM, Unstructured
from secateur.core.solve.base import Layer
from secateur.core.solve.sparsegpt import SparseGPT, block_counts
from tests.property import layers, oracles

FREE = Unstructured()


def scaled(inputs: int, c: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return c * torch.eye(inputs, dtype=dtype)


@pytest.mark.parametrize("c", [1.0, 0.3, 1e-12, 7e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fill", ["normal", "ties", "equal", "sparse", "neighbours"])
def test_with_equal_inputs_it_is_magnitude_block_by_block(c: float, dtype: torch.dtype, fill: str) -> None:
    w = fills(fill, (7, 22)).to(dtype)
    for count in (1, 60, 77, 130, 154):
        found = SparseGPT(block=8)(w, hessian=scaled(22, c), pattern=FREE, count=count)
        gone = ~found.mask
        assert int(gone.sum()) == max(count, int((w == 0).sum()))
        for a in range(0, 22, 8):
            block = w[:, a : a + 8].contiguous()
            here = gone[:, a : a + 8].numpy()
            expected = oracles.smallest({"w": block}, int(here.sum()))["w"]
            np.testing.assert_array_equal(here.reshape(-1), expected)
        assert torch.equal(found.weight, w.to(found.weight.dtype).masked_fill(gone, 0.0))


def fills(kind: str, shape: tuple[int, int]) -> Tensor:
    g = torch.Generator().manual_seed(3)
    w = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == "ties":
        return (2 * w).round()
    if kind == "equal":
        return torch.full(shape, 0.5, dtype=torch.float64) * w.sign()
    if kind == "sparse":
        return w * (torch.rand(shape, generator=g) < 0.4)
    if kind == "neighbours":  # numbers one bit apart, whose squares and quotients round together
        steps = torch.randperm(w.numel(), generator=g).view(shape)
        return (torch.full(shape, 1.9, dtype=torch.float64).view(torch.int64) + steps).view(torch.float64)
    return w


@pytest.mark.parametrize("ratio", [(2, 4), (1, 3), (5, 7)])
def test_with_equal_inputs_groups_are_those_of_magnitude(ratio: tuple[int, int]) -> None:
    keep, of = ratio
    for fill in ("normal", "ties", "equal", "sparse"):
        w = fills(fill, (5, 6 * of)).float()
        count = 30 * (of - keep)
        found = SparseGPT()(w, hessian=scaled(6 * of, 0.3), pattern=NM(keep, of), count=count)
        np.testing.assert_array_equal((~found.mask).numpy().reshape(-1), oracles.nm(w, 1, keep, of))
        assert torch.equal(found.weight, w.masked_fill(~found.mask, 0.0))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 8, 40, 100])
def test_it_is_what_it_means(seed: int, block: int) -> None:
    d = layers.draw(9, 40, seed)
    w = d.weight * (torch.rand(9, 40, generator=torch.Generator().manual_seed(seed)) < 0.8)
    found = SparseGPT(block=block)(w, hessian=d.hessian, pattern=FREE, count=200)
    counts = [int(part.sum()) for part in (~found.mask).split(block, dim=1)]
    expected = layers.sparsegpt(w, layers.damped(d.hessian, 0.01), counts, block, None)
    assert sum(counts) == 200
    assert torch.equal(found.mask, expected != 0)
    torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-10)
    assert found.loss == pytest.approx(layers.error(d.x, w, expected), rel=1e-9)
    assert found.damping == pytest.approx(0.01 * float(d.hessian.diagonal().mean()), rel=1e-12)


@pytest.mark.parametrize("ratio", [(2, 4), (1, 4), (3, 5), (4, 10)])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_groups_are_chosen_from_weights_already_updated(ratio: tuple[int, int], block: int) -> None:
    keep, of = ratio
    d = layers.draw(6, 40, 1)
    w = d.weight * (torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) < 0.8)
    solve = SparseGPT(block=block, damping=0.02)
    found = solve(w, hessian=d.hessian, pattern=NM(keep, of), count=240 // of * (of - keep))
    expected = layers.sparsegpt(w, layers.damped(d.hessian, 0.02), None, 0, (of, of - keep))
    assert torch.equal(found.mask, expected != 0)
    torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-10)
    zeros = (w == 0).view(-1, of).sum(1)
    assert torch.equal((~found.mask).view(-1, of).sum(1), zeros.clamp(min=of - keep))


VALUES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1e-30, 3.0])


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A matrix full of ties and zeros, and a Hessian with dead inputs and far fewer samples than inputs."""
    rows, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    w = torch.tensor(draw(st.lists(VALUES, min_size=rows * inputs, max_size=rows * inputs)))
    x = layers.draw(1, inputs, draw(st.integers(0, 5)), samples=draw(st.integers(2, 20))).x
    dead = torch.tensor(draw(st.lists(st.booleans(), min_size=inputs, max_size=inputs)))
    dead[draw(st.integers(0, inputs - 1))] = False
    return w.view(rows, inputs), layers.hessian_of(x * ~dead)


@settings(max_examples=80)
@given(worlds(), st.integers(1, 14), st.data())
def test_the_count_is_exact(world: tuple[Tensor, Tensor], block: int, data: st.DataObject) -> None:
    w, h = world
    count = data.draw(st.integers(0, w.numel()))
    found = SparseGPT(block=block)(w, hessian=h, pattern=FREE, count=count)
    gone, zero, dead = ~found.mask, w == 0, (h.diagonal() == 0).expand_as(w)
    assert int(gone.sum()) == max(count, int(zero.sum()))
    assert bool(gone[zero].all())
    free, cheap = int((zero | dead).sum()), int((gone & (zero | dead)).sum())
    assert cheap == (free if count >= free else int(gone.sum()))
    assert not bool(found.weight[gone].signbit().any()) and not bool((found.weight[gone] != 0).any())
    assert torch.equal(found.weight[found.mask & dead], w[found.mask & dead])


@settings(max_examples=80)
@given(worlds(), st.integers(1, 14))
def test_blocks_lose_alike_and_get_nothing_back(world: tuple[Tensor, Tensor], width: int) -> None:
    w, h = world
    layer = Layer.of(w, h, "w")
    zeros = int(layer.zero.sum())
    before = [int(z.sum()) for z in layer.zero.split(width, dim=1)]
    sizes = [b.numel() for b in w.split(width, dim=1)]
    for count in range(zeros, w.numel() + 1):
        counts = block_counts(layer, width, count)
        assert sum(counts) == count
        assert all(b <= c <= s for b, c, s in zip(before, counts, sizes, strict=True))
        if not bool(layer.zero.any() or layer.dead.any()):
            assert all(abs(c - count * s / w.numel()) <= 1 for c, s in zip(counts, sizes, strict=True))
        before = counts


def test_what_is_sparser_already_stays_as_it_is() -> None:
    d = layers.draw(12, 24, 0)
    half = 12 * 24 // 2
    for solve, pattern in ((SparseGPT(block=8), FREE), (SparseGPT(), NM(2, 4))):
        once = solve(d.weight, hessian=d.hessian, pattern=pattern, count=half)
        for less in (half, half - 50) if pattern is FREE else (half,):
            again = solve(once.weight, hessian=d.hessian, pattern=pattern, count=less)
            assert torch.equal(again.weight, once.weight) and torch.equal(again.mask, once.mask)
            assert again.loss == 0.0


def test_zeros_stay_when_more_is_asked() -> None:
    d = layers.draw(12, 24, 0)
    solve = SparseGPT(block=8)
    once = solve(d.weight, hessian=d.hessian, pattern=FREE, count=100)
    more = solve(once.weight, hessian=d.hessian, pattern=FREE, count=200)
    assert int((more.weight == 0).sum()) == 200
    assert not bool((more.mask & ~once.mask).any())


@pytest.mark.parametrize("pattern", [FREE, NM(2, 4)], ids=str)
def test_float32_agrees_with_float64(pattern: Unstructured | NM) -> None:
    d = layers.draw(64, 128, 5)
    wide = SparseGPT()(d.weight, hessian=d.hessian, pattern=pattern, count=4096)
    narrow = SparseGPT()(d.weight.float(), hessian=d.hessian.float(), pattern=pattern, count=4096)
    assert (wide.weight.dtype, narrow.weight.dtype) == (torch.float64, torch.float32)
    assert int((wide.mask != narrow.mask).sum()) <= 8
    assert narrow.loss == pytest.approx(wide.loss, rel=1e-2)
    same = (wide.mask == narrow.mask).all(1)
    torch.testing.assert_close(narrow.weight[same].double(), wide.weight[same], rtol=1e-3, atol=1e-3)
