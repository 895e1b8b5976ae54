"""Caps and floors: the total stays exact, no tensor goes beyond its own, and what cannot be is refused."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.core.make import make
from secateur.core.request import Request
from secateur.errors import Infeasible
from secateur.stores.base import matches

from . import oracles
from .worlds import example, masks_of, specs_of, weights, whole

SHAPES = {"a": (7, 3), "b.conv": (10,), "b.fc": (30,), "c": (0,), "d": (1,), "e": (19,)}
GLOBS = {"a": ["a"], "b": ["b.conv", "b.fc"], "b.*": ["b.conv", "b.fc"], "c": ["c"], "d": ["d"], "[de]": ["d", "e"]}
"""Globs, and the tensors each means."""
shares = st.integers(0, 9).map(lambda s: s / 10)
caps = st.none() | shares | st.dictionaries(st.sampled_from(list(GLOBS)), shares, min_size=1, max_size=2)


def high_of(tensors: Mapping[str, Tensor], cap: float | Mapping[str, float] | None, min_keep: int) -> dict[str, int]:
    """What each tensor may lose, worked out from the words: a full name before a glob, zeros in any case."""
    out = {}
    for name, t in tensors.items():
        share = cap
        if isinstance(cap, Mapping):
            share = cap.get(name, next((v for g, v in cap.items() if name in GLOBS[g]), None))
        n, zeros = t.numel(), int((oracles.values(t) == 0).sum())
        most = n if share is None else round(Fraction(str(share)) * n)
        out[name] = max(zeros, min(most, max(0, n - min_keep)))
    return out


def ambiguous(cap: object) -> bool:
    """Whether two globs give one tensor different caps."""
    return isinstance(cap, Mapping) and "b" in cap and "b.*" in cap and cap["b"] != cap["b.*"]


def zeros_in(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {n: int((oracles.values(t) == 0).sum()) for n, t in tensors.items()}


@pytest.mark.parametrize("allocation", ["global", "lamp", "uniform", "er", "erk"])
@settings(max_examples=25)
@given(st.data(), caps, st.integers(0, 12), st.integers(0, 89))
def test_caps_hold_and_the_total_is_exact(
    allocation: str, data: st.DataObject, cap: object, min_keep: int, asked: int
) -> None:
    tensors = weights(data.draw, SHAPES, data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    n = sum(t.numel() for t in tensors.values())
    if ambiguous(cap):
        cap = None
    high, zeros = high_of(tensors, cap, min_keep), zeros_in(tensors)  # type: ignore[arg-type]
    request = Request.of(asked / 100, allocation=allocation, max_sparsity=cap, min_keep=min_keep)
    share = Fraction(asked, 100)
    total = max(round(share * n), sum(zeros.values()))
    if allocation == "uniform":
        total = sum(max(round(share * t.numel()), zeros[k]) for k, t in tensors.items())
    specs = specs_of(tensors, out_dim=0)
    if total > sum(high.values()):
        with pytest.raises(Infeasible, match="max_sparsity and min_keep allow only"):
            make(specs, whole(tensors), request, matches)
        return
    plan = make(specs, whole(tensors), request, matches)
    found = {r.name: r.prune for r in plan.rows}
    assert plan.prune == total
    assert all(zeros[k] <= found[k] <= high[k] for k in tensors)
    if allocation == "global":
        expected = oracles.capped(tensors, total, high)
        for name, keep in masks_of(plan, tensors).items():
            np.testing.assert_array_equal(~keep.reshape(-1).numpy(), expected[name])
    if allocation == "lamp":
        assert found == oracles.lamp_counts(dict(sorted(tensors.items())), total, high)


@pytest.mark.parametrize("allocation", ["global", "uniform", "uniform_plus", "er", "erk", "lamp"])
def test_what_cannot_be_is_refused_and_nothing_is_touched(allocation: str) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(10, 10, bias=False) for _ in range(3)))
    before = [p.detach().clone() for p in model.parameters()]
    for asked in ({"max_sparsity": 0.5}, {"min_keep": 41}, {"max_sparsity": {"0*": 0, "1*": 0.7}}):
        with pytest.raises(Infeasible, match="allow only"):
            secateur.prune(model, 0.6, allocation=allocation, **asked)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_cap_of_zero_keeps_a_layer_dense() -> None:
    w = {f"{i}.weight": example((10, 10), torch.float32, seed=i) for i in range(3)}
    report = secateur.prune(w, 0.5, max_sparsity={"0": 0})
    assert report.rows[0].zeros == 0 and report.zeros == 150


def test_a_cap_below_what_is_zero_already_leaves_it_there() -> None:
    w = {"a.weight": torch.ones(10, 10), "b.weight": torch.ones(10, 10)}
    w["a.weight"][:5] = 0
    report = secateur.prune(w, 0.5, max_sparsity={"a": 0.2})
    assert [r.zeros for r in report] == [50, 50]


@pytest.mark.parametrize("pattern", ["2x2", "channel", "channel:in"])
@settings(max_examples=25)
@given(st.data(), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_caps_hold_for_units(pattern: str, data: st.DataObject, asked: int, cap_a: int, cap_b: int) -> None:
    """Passing over units of full tensors, in order, while weights fit: as a walk over all units says."""
    shapes = {"a": (4, 6), "b": (6, 4), "c": (2, 2)}
    tensors = weights(data.draw, shapes, torch.float32, ["normal", "few values", "sparse"])
    edges = {"2x2": (2, 2), "channel": (1, None), "channel:in": (None, 1)}[pattern]
    listed = []
    for n, shape in shapes.items():
        edge = [s if e is None else e for s, e in zip(shape, edges, strict=True)]
        listed += oracles.units(n, shape, edge)
    cap = {"a": cap_a / 10, "b": cap_b / 10}
    zeros = zeros_in(tensors)
    high = {n: max(zeros[n], round(Fraction(str(cap.get(n, 1))) * t.numel())) for n, t in tensors.items()}
    total = round(Fraction(asked, 10) * sum(t.numel() for t in tensors.values()))
    request = Request.of(asked / 10, pattern=pattern, max_sparsity=cap)
    specs = specs_of(tensors, out_dim=0, in_dim=1)
    if oracles.held_back(tensors, listed, total, "mean", high):
        with pytest.raises(Infeasible, match="in whole units max_sparsity and min_keep allow only"):
            make(specs, whole(tensors), request, matches)
        return
    plan = make(specs, whole(tensors), request, matches)
    found = {n: set((~m).reshape(-1).nonzero().reshape(-1).tolist()) for n, m in masks_of(plan, tensors).items()}
    expected: dict[str, set[int]] = {n: set() for n in tensors}
    for i in oracles.smallest_units(tensors, listed, total, "mean", high):
        expected[listed[i][0]].update(listed[i][1])
    assert found == expected
    assert all(zeros[n] <= r.prune <= high[n] for n, r in zip(sorted(tensors), plan.rows, strict=True))


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_caps_count_single_zeros_too(allocation: str) -> None:
    """A cap is on the tensor's sparsity, so zeros scattered over blocks that survive count against it."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(8, 8, generator=g) + 0.1, torch.rand(8, 8, generator=g) + 2
    a[::2, ::2] = 0
    w = {"a.weight": a, "b.weight": b}
    report = secateur.prune(w, 0.4, pattern="2x2", max_sparsity={"a": 0.4}, allocation=allocation)
    assert report.rows[0].sparsity is not None and report.rows[0].sparsity <= 0.4
    whole_units = [int((t.view(4, 2, 4, 2) == 0).all(3).all(1).sum()) * 4 for t in w.values()]
    assert sum(whole_units) == 48  # of 51 asked


def test_caps_that_fall_short_in_whole_units_are_refused() -> None:
    """18 of 40 weights may go in each, one channel of ten; 36 are asked, three channels."""
    w = {"a.weight": torch.randn(4, 10), "b.weight": torch.randn(4, 10)}
    with pytest.raises(Infeasible, match=r"36 of 80 weights are to go, but in whole units .* allow only 20 \(25"):
        secateur.plan(w, 0.45, pattern="channel", max_sparsity=0.45)
    assert secateur.plan(w, 0.45, pattern="channel", max_sparsity=0.5).prune == 30
    assert secateur.plan(w, 0.3, pattern="channel", max_sparsity=0.45).prune == 20


@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk"])
def test_what_is_kept_because_it_is_no_number_is_a_floor(allocation: str) -> None:
    """Half of b is NaN and stays; the others lose as much more as that takes."""
    w = {"a.weight": example((10, 10), torch.float32), "b.weight": example((10, 10), torch.float32, seed=1)}
    w["b.weight"][5:] = torch.nan
    report = secateur.prune(w, 0.7, allocation=allocation, nonfinite="keep", max_sparsity=0.95)
    assert report.zeros == 140
    assert int(torch.isnan(w["b.weight"]).sum()) == 50
