"""Solvers: what they refuse and what they say; damping, dead inputs, strides, precision, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.core.patterns import NM, Block, Pattern, Unstructured
from secateur.core.solve import obs
from secateur.core.solve.base import MOST_SHARE, Solution, Solver, exactly
from secateur.core.solve.least_squares import refit
from secateur.core.solve.obs import OBS, ExactOBS
from secateur.core.solve.sparsegpt import SparseGPT
from secateur.errors import BadInput, BadTensor, NotDefined
from tests.property import layers

FREE = Unstructured()
SOLVERS: dict[str, Solver] = {"SparseGPT": SparseGPT(), "OBS": OBS(), "ExactOBS": ExactOBS()}


def refitted(
    weight: Tensor, *, hessian: Tensor, pattern: Pattern, count: int, name: str = "", damping: float = 0.0
) -> Solution:
    """The refit of the mask of magnitude, called as a solver is."""
    gone = layers.stable_first(weight.float().abs(), weight == 0, count)
    return refit(weight, hessian=hessian, mask=~gone.to(weight.device), name=name, damping=damping)


ALL: dict[str, Solver] = {**SOLVERS, "refit": refitted}
solvers = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
everyone = pytest.mark.parametrize("solve", ALL.values(), ids=ALL)


def test_every_solver_can_be_told_apart_and_compared() -> None:
    assert SparseGPT() == SparseGPT(block=128, damping=0.01) != SparseGPT(block=64)
    assert OBS() == OBS(0.01) and ExactOBS() == ExactOBS(0.01) and len({OBS(), OBS(), ExactOBS(0.1)}) == 2


@pytest.mark.parametrize("damping", [-0.1, math.nan, math.inf, True, "0.01", None])
@pytest.mark.parametrize("make", [SparseGPT, OBS, ExactOBS], ids=lambda m: m.__name__)
def test_bad_damping(make: Callable[..., Any], damping: Any) -> None:
    with pytest.raises(BadInput, match="damping"):
        make(damping=damping)
    with pytest.raises(BadInput, match="damping"):
        refit(torch.ones(2, 2), hessian=torch.eye(2), mask=torch.ones(2, 2).bool(), damping=damping)


@pytest.mark.parametrize("block", [0, -1, True, 2.0, "128", None])
def test_bad_block(block: Any) -> None:
    with pytest.raises(BadInput, match="block"):
        SparseGPT(block=block)


@solvers
@pytest.mark.parametrize("count", [-1, 13, True, 0.5, "6", None])
def test_bad_count(solve: Solver, count: Any) -> None:
    with pytest.raises(BadInput, match=r"'fc.weight' \(shape \(3, 4\), float32\).*0 to 12"):
        solve(torch.ones(3, 4), hessian=torch.eye(4), pattern=FREE, count=count, name="fc.weight")


def bad_hessians() -> dict[str, tuple[Tensor, str]]:
    h = layers.draw(1, 4, 0).hessian.float()
    broken = {k: h.clone() for k in ("nan", "inf", "negative", "lopsided", "beside")}
    broken["nan"][1, 2] = torch.nan
    broken["inf"][3, 3] = torch.inf
    broken["negative"][2, 2] = -1.0
    broken["lopsided"][0, 1] += 5.0
    broken["beside"][1, 1] = 0.0
    return {
        "beside": (broken["beside"], "beside a diagonal that is zero"),
        "nan": (broken["nan"], "1 NaN or infinite"),
        "inf": (broken["inf"], "1 NaN or infinite"),
        "negative": (broken["negative"], "negative diagonal"),
        "lopsided": (broken["lopsided"], "not symmetric"),
        "too small": (h[:3, :3], r"\(4, 4\) \(in, in\), got \(3, 3\)"),
        "not square": (h[:, :3], r"got \(4, 3\)"),
        "flat": (h.reshape(-1), r"got \(16,\)"),
        "half": (h.half(), "float16: sum it in float32 or float64"),
        "integers": (torch.eye(4, dtype=torch.int64), "int64: sum it"),
        "elsewhere": (h.to("meta"), "on meta, the weights on cpu"),
        "all dead": (torch.zeros(4, 4), "all 4 inputs.*are dead.*[Cc]alibrat"),
    }


@everyone
@pytest.mark.parametrize("kind", bad_hessians())
def test_bad_hessians(solve: Solver, kind: str) -> None:
    h, said = bad_hessians()[kind]
    w = torch.ones(3, 4)
    with pytest.raises(BadTensor, match=said) as caught:
        solve(w, hessian=h, pattern=FREE, count=6, name="fc.weight")
    assert "'fc.weight'" in str(caught.value)
    assert torch.equal(w, torch.ones(3, 4))


@everyone
def test_a_hessian_that_no_inputs_have(solve: Solver) -> None:
    """Indefinite by as much as its diagonal: damping cannot mend it, and does not try for ever."""
    h = torch.tensor([[1.0, 50.0], [50.0, 1.0]])
    with pytest.raises(BadTensor, match=rf"'w'.*not positive definite, also with {MOST_SHARE:g} times"):
        solve(
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            hessian=h,
            pattern=FREE,
            count=0 if solve is refitted else 1,
            name="w",
        )


@solvers
@pytest.mark.parametrize(
    ("w", "said"),
    [
        (torch.full((3, 4), torch.nan), "12 NaN or infinite weights"),
        (torch.eye(3, 4).masked_fill(torch.eye(3, 4) == 1, torch.inf)[:1], "1 NaN or infinite weight[.]"),
        (torch.ones(4), "a matrix"),
        (torch.ones(2, 4, 1), "a matrix"),
        (torch.ones(0, 4), "not empty"),
        (torch.ones(3, 4, dtype=torch.int32), "real floats"),
        (torch.ones(3, 4, dtype=torch.complex64), "real floats"),
        (torch.ones(3, 4).to_sparse(), "real floats"),
        (torch.ones(3, 4, device="meta"), "real floats"),
    ],
    ids=["nan", "inf", "flat", "cube", "empty", "integers", "complex", "sparse", "meta"],
)
def test_bad_weights(solve: Solver, w: Tensor, said: str) -> None:
    with pytest.raises(BadTensor, match=said) as caught:
        solve(w, hessian=torch.eye(4), pattern=FREE, count=0, name="fc.weight")
    assert "'fc.weight'" in str(caught.value)


@solvers
def test_bad_patterns(solve: Solver) -> None:
    w, h = torch.ones(4, 6), torch.eye(6)
    with pytest.raises(NotDefined, match="Block"):
        solve(w, hessian=h, pattern=Block((2, 2)), count=12)
    with pytest.raises(NotDefined, match="6 inputs do not divide into groups of 4"):
        solve(w, hessian=h, pattern=NM(2, 4), count=12)
    with pytest.raises(NotDefined, match=r"1:3 leaves 16 of the 24 weights.*got count=12"):
        solve(w, hessian=h, pattern=NM(1, 3), count=12)


def test_obs_says_which_solver_to_take() -> None:
    with pytest.raises(NotDefined, match="take ExactOBS"):
        OBS()(torch.ones(2, 4), hessian=torch.eye(4), pattern=NM(2, 4), count=4)
    rows = obs.LARGEST // 64**2 + 1
    with pytest.raises(BadInput, match="Take ExactOBS, or SparseGPT"):
        OBS()(torch.ones(rows, 64), hessian=torch.eye(64), pattern=FREE, count=4)


@pytest.mark.parametrize("mask", [torch.ones(3, 4), torch.ones(4, 3).bool(), torch.ones(3, 4, device="meta").bool()])
def test_bad_masks(mask: Tensor) -> None:
    with pytest.raises(BadTensor, match=r"mask of 'w' .*must be bool"):
        refit(torch.ones(3, 4), hessian=torch.eye(4), mask=mask, name="w")


def test_weights_too_far_apart_for_the_arithmetic() -> None:
    """A huge input goes, and what a tiny one would have to become for it is beyond float32."""
    h = torch.tensor([[1e30, 0.9e9], [0.9e9, 1e-12]], dtype=torch.float64)
    w = torch.tensor([[1e25, 1.0]])
    with pytest.raises(BadTensor, match=r"not finite.*float64"):
        SparseGPT(damping=0.0, block=1)(w, hessian=h, pattern=FREE, count=1)
    found = SparseGPT(damping=0.0, block=1)(w.double(), hessian=h, pattern=FREE, count=1)
    assert float(found.weight[0, 1]) == pytest.approx(0.9e46)


@everyone
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_singular_hessian_is_damped_until_it_works_and_says_how_much(solve: Solver, share: float) -> None:
    d = layers.draw(6, 12, 0, samples=4)
    scale = float(d.hessian.diagonal().mean())
    own = refitted if solve is refitted else type(solve)
    found = (
        refitted(d.weight, hessian=d.hessian, pattern=FREE, count=12, damping=share)
        if own is refitted
        else own(damping=share)(d.weight, hessian=d.hessian, pattern=FREE, count=12)
    )
    expected = share * scale if share else pytest.approx(1e-8 * scale, rel=1e-9)
    assert found.damping == expected
    assert bool(torch.isfinite(found.weight).all())


@solvers
@pytest.mark.parametrize(("dtype", "samples"), [(torch.float64, 11), (torch.float32, 8)])
def test_what_rounding_leaves_of_a_singular_hessian_is_not_taken_for_more(
    solve: Any, dtype: torch.dtype, samples: int
) -> None:
    """Half of these have a Cholesky factor in floating point; its last pivot is noise."""
    passed = 0
    for seed in range(40):
        d = layers.draw(1, 12, seed, samples=samples)
        h = layers.hessian_of(d.x.to(dtype))
        passed += int(torch.linalg.cholesky_ex(h.double()).info) == 0
        assert type(solve)(damping=0.0)(d.weight, hessian=h, pattern=FREE, count=3).damping > 0
    assert passed


@everyone
def test_scale_of_the_inputs_is_no_matter_also_where_some_are_dead(solve: Solver) -> None:
    d = layers.draw(6, 12, 0)
    x = d.x.clone()
    x[:, [2, 7]] = 0.0
    a, b = (solve(d.weight, hessian=layers.hessian_of(c * x), pattern=FREE, count=30) for c in (1.0, 2.0**-20))
    assert torch.equal(a.mask, b.mask) and torch.equal(a.weight, b.weight)
    assert b.damping == a.damping * 2.0**-40 and b.loss == pytest.approx(a.loss * 2.0**-40)
    live = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    if solve in SOLVERS.values():
        assert not bool(a.mask[:, [2, 7]].any())
        own = a._replace(weight=a.weight[:, live], mask=a.mask[:, live])
        if not isinstance(solve, SparseGPT):  # whose blocks of columns would be others
            less = solve(d.weight[:, live], hessian=layers.hessian_of(x[:, live]), pattern=FREE, count=18)
            assert torch.equal(less.mask, own.mask)
            torch.testing.assert_close(less.weight, own.weight, rtol=0, atol=1e-12)


@everyone
def test_weights_of_dead_inputs_that_stay_are_as_they_were(solve: Solver) -> None:
    d = layers.draw(6, 12, 0)
    x = d.x.float()
    x[:, 5:] = 1e-25  # whose squares are zero in float32, and whose products with others are not
    h = layers.hessian_of(x)
    assert not bool(h.diagonal()[5:].any()) and bool(h[5:, :5].all())
    found = solve(d.weight, hessian=h, pattern=FREE, count=20)
    dead = found.mask.clone()
    dead[:, :5] = False
    assert bool(dead.any()) and torch.equal(found.weight[dead], d.weight[dead])
    if solve is not refitted:
        assert found.loss == 0.0 and bool(found.mask[:, :5].all())


@everyone
@pytest.mark.parametrize("pattern", [FREE, NM(2, 4)], ids=str)
def test_strides_are_no_matter_and_nothing_given_is_touched(solve: Solver, pattern: Pattern) -> None:
    if isinstance(solve, OBS) and isinstance(pattern, NM):
        return
    d = layers.draw(6, 12, 0)
    w, h = d.weight.to(torch.float64), d.hessian
    wide_w, wide_h = torch.zeros(12, 24, dtype=w.dtype), torch.zeros(24, 36, dtype=h.dtype)
    wide_w[::2, ::2], wide_h[::2, ::3] = w, h
    shapes = {
        "as it is": (w.clone(), h.clone()),
        "transposed": (w.t().contiguous().t(), h.clone().t()),
        "strided": (wide_w[::2, ::2], wide_h[::2, ::3]),
        "parameter": (torch.nn.Parameter(w.clone()), torch.nn.Parameter(h.clone())),
    }
    expected = solve(w.clone(), hessian=h.clone(), pattern=pattern, count=36)
    for v, g in shapes.values():
        found = solve(v, hessian=g, pattern=pattern, count=36)
        assert torch.equal(v, w) and torch.equal(g, h)
        assert torch.equal(found.weight, expected.weight) and torch.equal(found.mask, expected.mask)
        assert found.weight.is_contiguous() and found.mask.is_contiguous() and not found.weight.requires_grad
        assert found.weight.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()


@everyone
@pytest.mark.parametrize("count", [0, 20])
def test_also_where_nothing_is_left_to_do_the_result_is_a_copy(solve: Solver, count: int) -> None:
    d = layers.draw(6, 12, 0)
    w = d.weight * (torch.arange(72).view(6, 12) % 3 > 0)
    w[0, 0] = -0.0
    found = solve(w, hessian=d.hessian, pattern=FREE, count=24 if solve is refitted else count)
    found.weight.add_(1.0)
    assert torch.equal(w == 0, torch.arange(72).view(6, 12) % 3 == 0)
    assert not bool(found.weight.signbit()[0, 0])


@everyone
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2fnuz])
def test_narrow_weights_are_solved_in_wider_arithmetic(solve: Solver, dtype: torch.dtype) -> None:
    d = layers.draw(6, 12, 0)
    w = d.weight.to(dtype)
    found = solve(w, hessian=d.hessian, pattern=FREE, count=36)
    expected = solve(w.float(), hessian=d.hessian, pattern=FREE, count=36)
    assert found.weight.dtype == expected.weight.dtype
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.mask, expected.mask)


@everyone
def test_the_same_bits_twice_whatever_precision_was_allowed(solve: Solver) -> None:
    d = layers.draw(64, 64, 0)
    w, h = d.weight.float(), d.hessian.float()
    first = solve(w, hessian=h, pattern=FREE, count=2048)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = solve(w, hessian=h, pattern=FREE, count=2048)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
        with pytest.raises(BadTensor):
            solve(w * torch.nan, hessian=h, pattern=FREE, count=2048)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(first.weight, again.weight) and torch.equal(first.mask, again.mask)
    assert (first.loss, first.damping) == (again.loss, again.damping)


def test_no_tf32_inside() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with exactly():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # type: ignore[attr-defined]
            assert not torch.is_grad_enabled()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize(("rows", "inputs"), [(576, 576), (576, 1536)])
@pytest.mark.parametrize("pattern", [FREE, NM(2, 4)], ids=str)
def test_layers_of_a_small_language_model_take_seconds(rows: int, inputs: int, pattern: Pattern) -> None:
    """Processor time of one thread; about half a second for the larger on a quiet machine."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(rows, inputs, generator=g), torch.randn(2048, inputs, generator=g)
    h = 2 / 2048 * (x.T @ x)
    start = time.process_time()
    found = SparseGPT()(w, hessian=h, pattern=pattern, count=rows * inputs // 2)
    assert time.process_time() - start < 15
    assert int((~found.mask).sum()) == rows * inputs // 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@everyone
@pytest.mark.parametrize("pattern", [FREE, NM(2, 4)], ids=str)
def test_on_a_gpu_as_on_the_cpu(solve: Solver, pattern: Pattern) -> None:
    if isinstance(solve, OBS) and isinstance(pattern, NM):
        return
    d = layers.draw(48, 64, 0)
    here = solve(d.weight, hessian=d.hessian, pattern=pattern, count=1536)
    there = solve(d.weight.cuda(), hessian=d.hessian.cuda(), pattern=pattern, count=1536)
    assert there.weight.is_cuda and there.mask.is_cuda
    assert torch.equal(here.mask, there.mask.cpu())
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=0, atol=1e-9)
    assert there.loss == pytest.approx(here.loss, rel=1e-9) and there.damping == pytest.approx(here.damping, rel=1e-12)
    torch.set_float32_matmul_precision("high")
    try:
        narrow = solve(d.weight.float().cuda(), hessian=d.hessian.float().cuda(), pattern=pattern, count=1536)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert int((narrow.mask.cpu() != here.mask).sum()) <= 8
