"""Absolute, exact and nested: every allocation, from the same weights and from weights pruned before."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.core.make import make
from secateur.core.plan import Plan
from secateur.core.request import Request
from secateur.core.types import Spec
from secateur.errors import Infeasible
from secateur.stores.base import matches

from . import oracles
from .worlds import masks_of, pruned, weights, whole

Pool = dict[str, Tensor]
ALLOCATIONS = ["global", "uniform", "uniform_plus", "er", "erk", "lamp"]
CRITERIA = {"magnitude": "magnitude", "random": secateur.random(1)}
SHAPES = {"conv": (4, 3, 3, 3), "empty": (0, 5), "fc1": (12, 9), "fc2": (1, 7), "head": (5, 12)}
SPECS = [
    Spec(name, shape, torch.float32, "conv" if len(shape) == 4 else "linear", out_dim=0, in_dim=1, order=i)
    for i, (name, shape) in enumerate(SHAPES.items())
]
sparsities = st.integers(0, 99).map(lambda s: s / 100) | st.floats(0, 0.999)


@dataclass(frozen=True)
class Asked:
    """An allocation, a criterion, and caps."""

    allocation: str
    criterion: str
    max_sparsity: float | None = None
    min_keep: int = 0

    def __str__(self) -> str:
        caps = f"-{self.max_sparsity}-{self.min_keep}" if self.max_sparsity else ""
        return f"{self.allocation}-{self.criterion}{caps}"

    def plan(self, tensors: Pool, sparsity: float) -> Plan:
        request = Request.of(
            sparsity,
            allocation=self.allocation,
            criterion=CRITERIA[self.criterion],
            max_sparsity=self.max_sparsity,
            min_keep=self.min_keep,
        )
        return make(SPECS, whole(tensors), request, matches)


def asked() -> list[Asked]:
    free = [Asked(a, c) for a in ALLOCATIONS for c in CRITERIA if (a, c) != ("lamp", "random")]
    return free + [Asked(a, "magnitude", 0.7, 2) for a in ALLOCATIONS]


every = pytest.mark.parametrize("asked", asked(), ids=str)


def draw_weights(data: st.DataObject) -> Pool:
    return weights(data.draw, SHAPES, torch.float32)


def zeros_of(tensors: Pool) -> dict[str, int]:
    return {n: int((oracles.values(t) == 0).sum()) for n, t in tensors.items()}


@every
@settings(max_examples=8)
@given(st.data(), sparsities)
def test_the_total_is_exact(asked: Asked, data: st.DataObject, sparsity: float) -> None:
    tensors = draw_weights(data)
    zeros = zeros_of(tensors)
    n = sum(s.numel for s in SPECS)
    share = Fraction(str(sparsity))
    counts = {s.name: max(round(share * s.numel), zeros[s.name]) for s in SPECS}
    total = sum(counts.values()) if asked.allocation == "uniform" else max(round(share * n), sum(zeros.values()))
    try:
        plan = asked.plan(tensors, sparsity)
    except Infeasible:
        assert asked.max_sparsity or asked.allocation == "uniform_plus"
        return
    assert plan.prune == total
    after = pruned(plan, tensors)
    assert {r.name: r.prune for r in plan.rows} == zeros_of(after)
    if asked.allocation == "uniform" and not asked.max_sparsity:
        assert {r.name: r.prune for r in plan.rows} == counts


@every
@settings(max_examples=8)
@given(st.data(), sparsities, sparsities)
def test_a_sparser_mask_lies_inside_a_denser_one(asked: Asked, data: st.DataObject, a: float, b: float) -> None:
    """Also where the weights were pruned in between, and the same sparsity again changes nothing."""
    tensors = draw_weights(data)
    low, high = sorted((a, b))
    try:
        denser, sparser = asked.plan(tensors, low), asked.plan(tensors, high)
    except Infeasible:
        return
    keep, less = masks_of(denser, tensors), masks_of(sparser, tensors)
    assert all(bool((keep[n] | ~less[n]).all()) for n in tensors)
    assert all(r.prune <= s.prune for r, s in zip(denser.rows, sparser.rows, strict=True))
    between = pruned(denser, tensors)
    again = asked.plan(between, low)
    assert [r.prune for r in again.rows] == [r.prune for r in denser.rows]
    assert all(torch.equal(masks_of(again, between)[n], between[n] != 0) for n in tensors)
    onward = masks_of(asked.plan(between, high), between)
    assert all(torch.equal(onward[n], less[n]) for n in tensors)


@every
def test_no_weight_comes_back_at_any_step(asked: Asked) -> None:
    """Totals from nothing to all that is allowed, in steps of a few weights."""
    g = torch.Generator().manual_seed(3)
    tensors = {s.name: torch.randn(s.shape, generator=g) for s in SPECS}
    n = sum(s.numel for s in SPECS)
    before = [0] * len(SPECS)
    for count in range(0, n, 11):
        try:
            plan = asked.plan(tensors, count / n)
        except Infeasible:
            assert count > n / 3
            break
        now = [r.prune for r in plan.rows]
        assert all(x <= y for x, y in zip(before, now, strict=True))
        assert asked.allocation == "uniform" or sum(now) == count
        before = now
