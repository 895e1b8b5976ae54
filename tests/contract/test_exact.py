"""Promise 1: the count is exact to the weight (blocks and channels: to the unit), in every dtype, with any ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import secateur
from tests.contract import oracle
from tests.contract.nets import CHOSEN, Kind, is_zero, net
from tests.contract.oracle import Bools, count
from tests.contract.table import (
    ALLOCATIONS,
    CRITERIA,
    DEFINED,
    DTYPES,
    PATTERNS,
    PLAIN,
    Case,
    default_of,
    expected_warnings,
    ids,
    in_turn,
)

SLOPES = {
    "er": {"conv.weight": 3 * (8 + 4), "fc1.weight": 32 + 8, "fc2.weight": 4 + 32},
    "erk": {"conv.weight": 8 + 4 + 1 + 3, "fc1.weight": 32 + 8, "fc2.weight": 4 + 32},
}
"""Weights kept per unit of epsilon: density times size, worked out from the papers' formulas."""


def pool_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: model.get_parameter(n).detach().clone() for n in CHOSEN}


def counts_of(case: Case, pool: Mapping[str, Tensor], s: float, planned: Mapping[str, int]) -> dict[str, int]:
    """How many weights each tensor must lose. Where the formula leaves rounding open, the plan's own, checked."""
    sizes = {n: t.numel() for n, t in pool.items()}
    if case.allocation == "uniform":
        return {n: count(size, s) for n, size in sizes.items()}
    if case.allocation == "mapping":
        return {n: count(size, 0.25 if n.startswith("conv") else 0.75) for n, size in sizes.items()}
    if case.allocation == "function":
        return {n: int(size * s / 2) for n, size in sizes.items()}
    total = count(sum(sizes.values()), s)
    if case.allocation == "lamp":
        return oracle.lamp_counts(pool, total)
    assert sum(planned.values()) == max(total, sum(int(is_zero(t).sum()) for t in pool.values()))
    zeros = {n: int(is_zero(t).sum()) for n, t in pool.items()}
    if case.allocation == "uniform_plus":
        assert planned["conv.weight"] <= zeros["conv.weight"]  # the first convolution stays as it is
        assert planned["fc2.weight"] <= sizes["fc2.weight"] - count(sizes["fc2.weight"], 0.2)
        slopes, moved = {n: sizes[n] for n in ("fc1.weight", "fc2.weight")}, dict(planned)
        highest = {"fc1.weight": sizes["fc1.weight"], "fc2.weight": 102}
        common_level({n: (moved[n], k, zeros[n], highest[n]) for n, k in slopes.items()})
    else:
        kept = {n: sizes[n] - planned[n] for n in sizes}
        common_level({n: (kept[n], k, 0, sizes[n] - zeros[n]) for n, k in SLOPES[case.allocation].items()})
    return dict(planned)


def common_level(rows: Mapping[str, tuple[int, int, int, int]]) -> None:
    """Asserts that one level fits all: every count is ``level * slope``, rounded, or at one of its bounds."""
    free = {n: (c, slope) for n, (c, slope, low, high) in rows.items() if low < c < high}
    lows = [(c - 1) / slope for c, slope in free.values()]
    highs = [(c + 1) / slope for c, slope in free.values()]
    assert not free or max(lows) < min(highs), rows


def expected(case: Case, pool: Mapping[str, Tensor], s: float, planned: Mapping[str, int]) -> dict[str, Bools]:
    """Everything that must be zero afterwards."""
    pattern, criterion = PATTERNS[case.pattern], CRITERIA[case.criterion]
    if case.pattern == "2:4" or case.allocation == "global":
        total = count(sum(t.numel() for t in pool.values()), s)
        return oracle.gone(pattern, criterion, pool, total)
    counts = counts_of(case, pool, s, planned)
    return {n: oracle.gone(pattern, criterion, {n: pool[n]}, c)[n] for n, c in counts.items()}


def pruned_rightly(case: Case, dtype: str, kind: Kind, s: float) -> None:
    model = net(dtype, kind)
    pool = pool_of(model)
    with expected_warnings():
        report = secateur.prune(model, **case.asked(s))
    planned = {r.name: r.asked for r in report.chosen}
    must = expected(case, pool, s, {n: c for n, c in planned.items() if c is not None})
    for name in CHOSEN:
        got = is_zero(model.get_parameter(name)).numpy()
        assert got.sum() == must[name].sum() == report[name].zeros, (name, dtype, kind, s)
        assert np.array_equal(got, must[name]), (name, dtype, kind, s)
        left = ~torch.from_numpy(must[name])
        assert torch.equal(model.get_parameter(name).double()[left], pool[name].double()[left])


@pytest.mark.parametrize("case", PLAIN, ids=ids(PLAIN))
def test_every_combination_in_every_dtype(case: Case) -> None:
    most = 0.7 if case.allocation == "uniform_plus" else 0.9
    both: list[tuple[Kind, float]] = [("plain", most), ("ties", 0.4)]
    for step, dtype in enumerate(DTYPES):
        for kind, s in in_turn(case, both, step):
            pruned_rightly(case, dtype, kind, s)


@pytest.mark.parametrize("s", [0.0, 0.003, 0.125, 0.5, 0.999])
@pytest.mark.parametrize("pattern", ["unstructured", "4x4", "channel", "channel:in"])
def test_the_whole_range(pattern: str, s: float) -> None:
    pruned_rightly(Case(pattern, default_of(pattern), "magnitude"), "bfloat16", "ties", s)
    pruned_rightly(Case(pattern, "uniform", "magnitude"), "float32", "plain", s)


WITH_BAD = [c for c in DEFINED if (c.nonfinite, c.amount) != ("error", "sparsity") or c.caps == "capped"]


@pytest.mark.parametrize("case", WITH_BAD, ids=ids(WITH_BAD))
def test_caps_thresholds_and_values_that_are_not_finite(case: Case) -> None:
    model = net("float32", "plain" if case.nonfinite == "error" else "bad")
    pool = pool_of(model)
    with expected_warnings():
        report = secateur.prune(model, **case.asked())
    found = {n: is_zero(model.get_parameter(n)).numpy() for n in CHOSEN}
    for name in CHOSEN:
        assert found[name].sum() == report[name].zeros
        if case.nonfinite == "keep":
            assert not (found[name] & oracle.bad(pool[name])).any()
    if case.amount == "threshold":
        for name, t in pool.items():
            small = np.abs(oracle.wide(t)) < 0.5  # never true of NaN
            assert np.array_equal(found[name], small | (oracle.bad(t) & (case.nonfinite == "prune")))
        return
    asked = {r.name: r.asked for r in report.chosen}
    settled(case, pool, found, {n: whole(case, n, found[n]) if c is None else c for n, c in asked.items()})


def whole(case: Case, name: str, found: Bools) -> int:
    """Weights that are zero because their unit went; for single weights all zeros."""
    pattern = PATTERNS[case.pattern]
    if not isinstance(pattern, secateur.Block | secateur.Channel):
        return int(found.sum())
    ids = oracle.unit_ids(pattern, found.shape, oracle.FEATURES[name]).ravel()
    left = np.bincount(ids, weights=~found.ravel())
    return int((left == 0).sum()) * unit_size(pattern, name)


def settled(case: Case, pool: Mapping[str, Tensor], found: Mapping[str, Bools], counts: Mapping[str, int]) -> None:
    """Asserts totals, caps, and that inside each tensor, and between tensors not held at a cap, the order rules."""
    pattern, criterion, reduce = PATTERNS[case.pattern], CRITERIA[case.criterion], None
    if case.caps == "capped":
        highest = {"conv.weight": 56, "fc1.weight": 216, "fc2.weight": 64}
        assert all(found[n].sum() <= highest[n] for n in CHOSEN)
    if case.pattern == "2:4" or case.allocation not in ("mapping", "function"):
        exact_total(case, counts, count(480, case.sparsity or 0.5))
    if case.allocation == "global" and case.pattern != "2:4":
        reduce = "mean"
        free = [n for n in CHOSEN if case.caps == "free" or counts[n] < highest[n] - unit_size(pattern, n)]
        k = sum(counts[n] for n in free) if case.caps == "capped" else count(480, 0.4)
        must = oracle.gone(pattern, criterion, {n: pool[n] for n in free}, k, case.nonfinite, reduce)
        assert all(np.array_equal(found[n], must[n]) for n in free)
    for name in CHOSEN:
        # A cap counts single zeros too, so beside them fewer units may fit than were asked.
        k = whole(case, name, found[name]) if case.caps == "capped" else counts[name]
        must = oracle.gone(pattern, criterion, {name: pool[name]}, k, case.nonfinite, reduce)
        assert np.array_equal(found[name], must[name]), name


def unit_size(pattern: Any, name: str) -> int:
    shape = {"conv.weight": (8, 4, 1, 3), "fc1.weight": (32, 8), "fc2.weight": (4, 32)}[name]
    if not isinstance(pattern, secateur.Block | secateur.Channel):
        return 0
    units = int(oracle.unit_ids(pattern, shape, (0, 1)).max()) + 1
    return int(np.prod(shape)) // units


def exact_total(case: Case, counts: Mapping[str, int], total: int) -> None:
    """Single weights: to the weight. Units of one size: to the unit; of several, to the largest."""
    if case.allocation == "uniform":
        assert sum(counts.values()) == sum(count(n, 0.4) for n in (96, 256, 128)) == 191
    elif case.pattern in ("unstructured", "2:4") or case.allocation != "global":
        assert sum(counts.values()) == total
    else:
        largest = max(unit_size(PATTERNS[case.pattern], n) for n in CHOSEN)
        assert total - len(CHOSEN) * largest < sum(counts.values()) <= total


def test_the_allocations_of_this_file_are_the_table() -> None:
    assert set(SLOPES) | {"global", "uniform", "uniform_plus", "lamp", "mapping", "function"} == set(ALLOCATIONS)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "mixed"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_equal(dtype: str, value: float) -> None:
    """Of equal weights the earlier tensor and the lower index go first; a tensor of zeros stays as it is."""
    kind = DTYPES[dtype]
    assert isinstance(kind, torch.dtype)
    target = {n: torch.full((3, 7), value, dtype=torch.float32).to(kind) for n in ("a.weight", "b.weight")}
    with expected_warnings():
        report = secateur.prune(target, 0.6)
    if value:
        assert report.zeros == count(42, 0.6) == 25
        assert is_zero(torch.cat([t.double().view(-1) for t in target.values()])).tolist() == [True] * 25 + [False] * 17
    else:
        assert report.zeros == 42


def test_a_million_bfloat16_normals() -> None:
    w = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert w.abs().unique().numel() < 2000
    dense = w.clone()
    for s in (0.5, 0.8, 0.9):
        pruned = dense.clone()
        assert secateur.prune(pruned, s).zeros == int(is_zero(pruned).sum()) == count(1_000_000, s)
