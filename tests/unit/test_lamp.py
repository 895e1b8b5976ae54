"""LAMP against its formula: exact fractions on small tensors, a full sort in float64 on large ones."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur import native
from secateur.core.allocate import Bounds
from secateur.core.keys import FORMATS
from secateur.core.lamp import count, count_together, lamp_counts, ranges_of, refined
from secateur.core.select import identity
from tests.property import oracles
from tests.property.worlds import DTYPES, FILLS, Pieces, dtypes, example, going, routes, specs_of, weights, whole


def counts(tensors: Mapping[str, Tensor], total: int, high: Mapping[str, int] | None = None) -> dict[str, int]:
    """The package's counts within the bounds of what is zero and ``high``."""
    specs = specs_of(tensors)
    zeros = {n: int((oracles.values(t) == 0).sum()) for n, t in tensors.items()}
    limits = [Bounds(zeros[s.name], s.numel if high is None else high[s.name]) for s in specs]
    total = max(total, sum(zeros.values()))
    found = lamp_counts(specs, limits, total, whole(tensors), identity)
    return {s.name: c for s, c in zip(specs, found, strict=True)}


SHAPES = {"a": (13,), "b": (30,), "c": (0,), "d": (1,), "e": (22,)}


@dtypes
@settings(max_examples=6)
@given(st.data())
def test_small_tensors_follow_the_formula(dtype: torch.dtype, data: st.DataObject) -> None:
    """All totals at once, in exact fractions; any finite bits but those whose squares leave float64."""
    fills = [f for f in FILLS if f != "any bits" or dtype != torch.float64]
    tensors = weights(data.draw, SHAPES, dtype, fills)
    n = sum(t.numel() for t in tensors.values())
    for total in sorted({0, n, *data.draw(st.lists(st.integers(0, n), min_size=3, max_size=3))}):
        assert counts(tensors, total) == oracles.lamp_counts(tensors, total)


@settings(max_examples=25)
@given(st.data())
def test_mixed_dtypes_and_caps(data: st.DataObject) -> None:
    tensors = {
        n: example(s, data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(FILLS[:5])))
        for n, s in SHAPES.items()
    }
    zeros = {n: int((oracles.values(t) == 0).sum()) for n, t in tensors.items()}
    high = {n: data.draw(st.integers(zeros[n], t.numel())) for n, t in tensors.items()}
    total = data.draw(st.integers(sum(zeros.values()), sum(high.values())))
    assert counts(tensors, total, high) == oracles.lamp_counts(tensors, total, high)


def sorted_counts(tensors: Mapping[str, Tensor], totals: list[int]) -> list[dict[str, int]]:
    """Scores by a cumulative sum over the sorted squares in extended precision, ties by name; equal weights share one."""
    names, scores, owner = sorted(tensors), [], []
    for rank, name in enumerate(names):
        w = np.sort(np.abs(oracles.values(tensors[name]))).astype(np.longdouble)
        square = w * w
        at_least = np.cumsum(square[::-1])[::-1]
        first = np.searchsorted(w, w, side="left")
        scores.append(np.where(square == 0, -1, square / np.where(square == 0, 1, at_least[first])).astype(np.float64))
        owner.append(np.full(w.size, rank))
    every = np.concatenate(owner)[np.lexsort((np.concatenate(owner), np.concatenate(scores)))]
    return [dict(zip(names, np.bincount(every[:t], minlength=len(names)).tolist(), strict=True)) for t in totals]


@routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_large_tensors_that_need_closer_looks(route: tuple[str, int], dtype: torch.dtype) -> None:
    """Three tensors of different spread and a table too coarse to decide: its ranges are cut until they do."""
    tensors = {
        "a": example((50_000,), dtype, seed=1),
        "b": (example((50_000,), torch.float64, seed=2) * 0.01).to(dtype),
        "c": (example((50_000,), torch.float64, seed=3) ** 3).to(dtype),
    }
    totals = [15_000, 75_000, 148_500]
    with going(route):
        assert [counts(tensors, t) for t in totals] == sorted_counts(tensors, totals)


@routes
def test_ranges_are_refined_and_stay_a_partition(route: tuple[str, int]) -> None:
    """What the counts rest on: after a refinement the ranges still hold every weight, and are smaller."""
    t = {"v": example((20_000,), torch.float32, seed=1), "w": example((50_000,), torch.float32)}
    specs = specs_of(t)
    ranges = ranges_of(specs, [count(s, whole(t), identity) for s in specs])
    assert (ranges.first < ranges.last).sum() > 200
    with going(route):
        finer = refined(ranges, whole(t), identity)
    assert len(finer.first) > 2 * len(ranges.first)
    for found in (ranges, finer):
        assert (found.below + found.per_tensor(found.counts)).tolist() == [20_000, 50_000]
        low, high = found.scores()
        for a, b in pairwise(found.starts):
            assert (found.first[a + 1 : b] > found.last[a : b - 1]).all()
            assert (low[a:b] <= high[a:b]).all() and (np.diff(low[a:b]) >= 0).all()
    low, high = ranges.per_tensor(ranges.sums)
    known = finer.per_tensor(finer.sums) + finer.above
    assert (known[0] == known[1]).all() and (low <= known[0]).all() and (known[0] <= high).all()


def test_narrowed_ranges_count_what_they_left_out() -> None:
    t = {"v": example((20_000,), torch.float32, seed=1), "w": example((50_000,), torch.float32)}
    specs = specs_of(t)
    ranges = ranges_of(specs, [count(s, whole(t), identity) for s in specs])
    low, high = ranges.scores()
    narrow = ranges.narrowed((low <= 1e-5) & (high >= 1e-6), high < 1e-6)
    assert 0 < len(narrow.first) < len(ranges.first) and (narrow.below > 0).all() and (narrow.above > 0).all()
    for found, before in zip(narrow.scores(), (low, high), strict=True):
        np.testing.assert_array_equal(found, before[(low <= 1e-5) & (high >= 1e-6)])


def test_subnormals_alone_keep_their_order() -> None:
    """A tensor whose largest weight is far below every normal number is scaled by that weight."""
    for tiny in (
        torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) * 5e-324,
        torch.tensor([1.0, 2.0, 3.0, 4.0]) * 1.5e-45,
    ):
        tensors = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=tiny.dtype), "b": tiny}
        assert counts(tensors, 4) == {"a": 2, "b": 2} and counts(tensors, 6) == {"a": 3, "b": 3}


def test_the_largest_of_every_tensor_scores_one_and_ties_go_by_name() -> None:
    """Whatever the rounding: with two of 3 x 50,000 left, they are the last two tensors' largest."""
    for seed in range(5):
        tensors = {n: example((50_000,), torch.float32, seed=10 * seed + i) for i, n in enumerate("abc")}
        assert counts(tensors, 149_997) == {"a": 49_999, "b": 49_999, "c": 49_999}
        assert counts(tensors, 149_998) == {"a": 50_000, "b": 49_999, "c": 49_999}


@settings(max_examples=15)
@given(st.integers(0, 60), st.sampled_from([1, 3, 17]), st.booleans())
def test_pieces_give_the_same_table(total: int, size: int, strided: bool) -> None:
    tensors = {n: example((20 + 5 * i,), torch.float32, "sparse", seed=i) for i, n in enumerate("abc")}
    for spec in specs_of(tensors):
        one = count(spec, whole(tensors), identity)
        other = count(spec, Pieces(tensors, size, strided).parts, identity)
        assert (one.zeros, one.exponent) == (other.zeros, other.exponent)
        for column in ("bins", "counts"):
            np.testing.assert_array_equal(getattr(one, column), getattr(other, column))


@dtypes
def test_counting_together_gives_the_same_bins(dtype: torch.dtype) -> None:
    if not native.available() or dtype == torch.float64 or not FORMATS[dtype].signed_zero:
        pytest.skip("counted one by one")
    tensors = {
        n: example((300 + 7 * i,), dtype, f, seed=i) for i, (n, f) in enumerate(zip("abcde", FILLS, strict=False))
    }
    specs = specs_of(tensors)
    together = count_together(specs, whole(tensors))
    for spec in specs:
        found, one = together[spec.name], count(spec, whole(tensors), identity)
        assert (found.zeros, found.exponent) == (one.zeros, one.exponent)
        for column in ("bins", "counts"):
            np.testing.assert_array_equal(getattr(found, column), getattr(one, column))


def test_scale_does_not_matter() -> None:
    """A tensor times a power of two keeps its scores: LAMP compares layers of any scale."""
    t = example((40,), torch.float32)
    for power in (-100, -20, 20, 100):
        tensors = {"a": t, "b": t * 2.0**power}
        assert counts(tensors, 31) == {"a": 16, "b": 15}
