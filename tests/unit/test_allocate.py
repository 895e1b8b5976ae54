"""Counts: the one rounding, the common level, Erdős–Rényi densities, caps by name, and what is refused."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur
from secateur.core.allocate import (
    Bounds,
    bounds,
    check_counts,
    check_sparsity,
    erdos_renyi,
    level_counts,
    pick,
    plus_limits,
    prune_count,
)
from secateur.core.types import Spec
from secateur.errors import BadInput, Infeasible
from secateur.stores.base import matches
from tests.property import oracles


@pytest.mark.parametrize("value", [0, 0.0, 0.9, 0.999999, 5e-324, Fraction(9, 10), Fraction(1, 3)])
def test_a_sparsity_is_a_python_number_below_one(value: Any) -> None:
    found = check_sparsity(value)
    assert found == float(value) and type(found) is float


REFUSED = [
    (90, "Did you mean 0.9?"),
    (50.0, "Did you mean 0.5?"),
    (99.5, "Did you mean 0.995?"),
    (1, "1 would prune every weight; a count of weights is not a sparsity"),
    (1.0, "1 would prune every weight"),
    (101, "0 <= sparsity < 1"),
    (-0.1, "0 <= sparsity < 1"),
    (math.nan, "0 <= sparsity < 1"),
    (math.inf, "0 <= sparsity < 1"),
    (True, "got True (bool)"),
    (False, "got False (bool)"),
    ("0.5", "got '0.5' (str)"),
    (None, "got None (NoneType)"),
    ([0.5], "got [0.5] (list)"),
    (0.5 + 0j, "complex"),
    (Decimal("0.5"), "Decimal"),
    (np.float32(0.5), "write sparsity=0.5"),
    (np.float64(0.25), "write sparsity=0.25"),
    (np.bool_(True), "numpy"),
    (np.array(0.5), "write sparsity=0.5"),
    (np.array([0.5, 0.6]), "give one number"),
    (torch.tensor(0.5), "write sparsity=0.5"),
    (torch.tensor([0.5, 0.6]), "give one number"),
    (torch.empty((), device="meta"), "give one number"),
]


@pytest.mark.parametrize(("value", "says"), REFUSED, ids=lambda v: repr(v))
def test_everything_else_is_refused_with_what_to_write(value: Any, says: str) -> None:
    with pytest.raises(BadInput) as e:
        check_sparsity(value)
    assert says in str(e.value) and "sparsity" in str(e.value)
    if value is not None:
        w = torch.ones(4)
        with pytest.raises(BadInput):
            secateur.prune(w, value)
        assert bool((w == 1).all())


@given(
    st.integers(0, 10**9) | st.integers(0, 1000), st.floats(0, 0.9999999) | st.integers(0, 999).map(lambda s: s / 1000)
)
def test_counts_round_the_number_that_was_written(n: int, sparsity: float) -> None:
    exact = Decimal(repr(sparsity)) * n
    assert prune_count(n, sparsity) == int(exact.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


@st.composite
def levels(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """(slopes, low, high, total) of a few tensors, small enough that steps coincide."""
    k = draw(st.integers(1, 5))
    slopes = draw(st.lists(st.integers(1, 12), min_size=k, max_size=k))
    high = [draw(st.integers(0, s)) for s in slopes]
    low = [draw(st.integers(0, h)) for h in high]
    return slopes, low, high, draw(st.integers(sum(low), sum(high)))


@settings(max_examples=300)
@given(levels(), st.booleans())
def test_one_common_level(case: tuple[list[int], list[int], list[int], int], earlier_first: bool) -> None:
    slopes, low, high, total = case
    limits = [Bounds(a, b) for a, b in zip(low, high, strict=True)]
    found = level_counts(slopes, limits, total, earlier_first=earlier_first)
    assert sum(found) == total
    assert all(a <= c <= b for a, c, b in zip(low, found, high, strict=True))
    assert found == oracles.level_counts(slopes, low, high, total, later_first=not earlier_first)
    if total < sum(high):
        more = level_counts(slopes, limits, total + 1, earlier_first=earlier_first)
        assert all(a <= b for a, b in zip(found, more, strict=True))


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=6), st.floats(0, 1))
def test_levels_of_large_sizes(sizes: list[int], share: float) -> None:
    """At any size there is one level that every count is the rounding of, and their sum is exact."""
    total = round(Fraction(share) * sum(sizes))
    found = level_counts(sizes, [Bounds(0, n) for n in sizes], total)
    assert sum(found) == total
    below = max(Fraction(2 * c - 1, 2 * n) for c, n in zip(found, sizes, strict=True))
    above = min(Fraction(2 * c + 1, 2 * n) for c, n in zip(found, sizes, strict=True))
    assert below <= above


def specs(shapes: dict[str, tuple[int, ...]], **more: Any) -> list[Spec]:
    role = {True: "conv", False: "linear"}
    return [
        Spec(n, s, torch.float32, role[len(s) == 4], out_dim=0, in_dim=1, order=i, **more)
        for i, (n, s) in enumerate(sorted(shapes.items()))
    ]


@st.composite
def networks(draw: st.DrawFn) -> dict[str, tuple[int, ...]]:
    conv = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 5]), st.sampled_from([1, 3]))
    linear = st.tuples(st.integers(1, 300), st.integers(1, 300))
    return {f"l{i}": draw(conv | linear) for i in range(draw(st.integers(1, 6)))}


@pytest.mark.parametrize("kernel", [True, False], ids=["erk", "er"])
@settings(max_examples=150)
@given(networks(), st.integers(0, 999))
def test_erdos_renyi_is_what_the_papers_say(kernel: bool, shapes: dict[str, tuple[int, ...]], thousandths: int) -> None:
    """Counts differ from size x density by a rounding, and a share of what all roundings add up to; the total is exact."""
    listed = specs(shapes)
    n = sum(s.numel for s in listed)
    total = n * thousandths // 1000
    found = erdos_renyi(listed, [Bounds(0, s.numel) for s in listed], total, kernel)
    assert sum(found) == total
    density = oracles.erk_densities(shapes, Fraction(n - total, n), kernel)
    for s, count in zip(listed, found, strict=True):
        assert abs((s.numel - count) - s.numel * density[s.name]) <= Fraction(1 + len(listed), 2)


def test_erk_of_a_known_network() -> None:
    """LeNet-300-100 at 90 %: eps = 26,620 / 1,894, so its layers keep 1084, 400 and 110 of every 1,594 in part."""
    shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    density = oracles.erk_densities(shapes, Fraction(1, 10))
    assert density["fc3"] == 1
    eps = Fraction(26_620 - 1000, 1084 + 400)
    assert density["fc1"] == eps * 1084 / 235_200 and density["fc2"] == eps * 400 / 30_000
    listed = specs(shapes)
    found = erdos_renyi(listed, [Bounds(0, s.numel) for s in listed], 239_580, True)
    assert found == [235_200 - 18_714, 30_000 - 6_906, 0]


def test_stacked_experts_are_so_many_layers() -> None:
    stack = Spec("a", (4, 8, 6), torch.float32, "experts", out_dim=1, in_dim=2, batch_dims=(0,))
    other = Spec("b", (20, 30), torch.float32, "linear", out_dim=0, in_dim=1)
    alone = [Spec(f"a{i}", (8, 6), torch.float32, "linear", out_dim=0, in_dim=1) for i in range(4)]
    for kernel in (True, False):
        one = erdos_renyi([stack, other], [Bounds(0, 192), Bounds(0, 600)], 600, kernel)
        four = erdos_renyi([*alone, other], [*[Bounds(0, 48)] * 4, Bounds(0, 600)], 600, kernel)
        assert abs(one[0] - sum(four[:4])) <= 2


def test_bounds_of_caps_and_floors() -> None:
    spec = Spec("w", (10,), torch.float32, "linear")
    assert bounds(spec, 0, None, 0) == Bounds(0, 10)
    assert bounds(spec, 2, 0.25, 0) == Bounds(2, 2)
    assert bounds(spec, 0, 0.35, 0) == Bounds(0, 4)
    assert bounds(spec, 0, None, 3) == Bounds(0, 7)
    assert bounds(spec, 8, 0.5, 3) == Bounds(8, 8)
    assert bounds(spec, 0, None, 11) == Bounds(0, 0)


def test_uniform_plus_keeps_a_first_convolution_and_a_fifth_of_the_last() -> None:
    listed = specs({"a": (4, 3, 3, 3), "b": (10, 10), "c": (5, 9)})
    free = [Bounds(0, s.numel) for s in listed]
    assert plus_limits(listed, free) == [Bounds(0, 0), Bounds(0, 100), Bounds(0, 36)]
    assert plus_limits(listed[1:], free[1:]) == [Bounds(0, 100), Bounds(0, 36)]
    with pytest.raises(BadInput, match="order of the layers"):
        plus_limits([Spec("a", (2,), torch.float32, "linear")], [Bounds(0, 2)])


def test_a_full_name_goes_before_a_glob_and_globs_must_agree() -> None:
    spec = Spec("enc.fc.weight", (2, 2), torch.float32, "linear", aliases=("tied.weight",))
    assert pick({"enc": 0.1, "enc.fc.weight": 0.7}, spec, matches, "caps") == 0.7
    assert pick({"tied.weight": 0.6, "*": 0.2}, spec, matches, "caps") == 0.6
    assert pick({"enc*": 0.5, "*fc*": 0.5}, spec, matches, "caps") == 0.5
    assert pick({"dec": 0.5}, spec, matches, "caps") is None
    with pytest.raises(BadInput, match=r"caps is ambiguous for 'enc\.fc\.weight'"):
        pick({"enc": 0.5, "*fc*": 0.6}, spec, matches, "caps")


BAD_COUNTS: list[tuple[Any, str]] = [
    ([1, 2], "must return {name: count}"),
    ({"a": 1}, "missing or unknown: ['b']"),
    ({"a": 1, "b": 1, "c": 1}, "missing or unknown: ['c']"),
    ({"a": 1, "b": 5}, "0 <= count <= 4"),
    ({"a": -1, "b": 1}, "gave -1"),
    ({"a": 1.0, "b": 1}, "gave 1.0"),
    ({"a": True, "b": 1}, "gave True"),
]


@pytest.mark.parametrize(("counts", "says"), BAD_COUNTS, ids=str)
def test_counts_of_a_function_are_checked(counts: Any, says: str) -> None:
    with pytest.raises(BadInput) as e:
        check_counts(counts, specs({"a": (2, 2), "b": (2, 2)}))
    assert says in str(e.value)


def test_mappings_and_functions_give_every_count() -> None:
    g = torch.Generator().manual_seed(0)
    w = {f"{n}.weight": torch.randn(10, 10, generator=g) for n in "abc"}
    plan = secateur.plan(w, 0.25, allocation={"a": 0.5, "b.weight": 0.125})
    assert [r.asked for r in plan.rows] == [50, 12, 25]
    seen = []

    def front(rows: Any, sparsity: float | None) -> dict[str, int]:
        seen.append(([(r.name, r.numel, r.zeros) for r in rows], sparsity))
        return {r.name: 10 * i for i, r in enumerate(rows)}

    assert [r.prune for r in secateur.plan(w, 0.3, allocation=front).rows] == [0, 10, 20]
    assert seen == [([("a.weight", 100, 0), ("b.weight", 100, 0), ("c.weight", 100, 0)], 0.3)]
    with pytest.raises(BadInput, match=r"says nothing of 'b\.weight'"):
        secateur.plan(w, allocation={"a": 0.5})
    with pytest.raises(BadInput, match="matches none"):
        secateur.plan(w, 0.1, allocation={"d": 0.5})


@pytest.mark.filterwarnings("ignore:left with nothing")
@pytest.mark.parametrize("allocation", ["er", "erk"])
def test_tensors_without_features_have_a_density_too(allocation: str) -> None:
    w = {"a.weight": torch.ones(()), "b.weight": torch.ones(3), "c.weight": torch.arange(1.0, 25).view(4, 6)}
    named = {"include": ["a.weight", "b.weight", "c.weight"], "roles": {"a.weight": "unknown", "b.weight": "unknown"}}
    alone = secateur.plan({"a.weight": w["a.weight"]}, 0.5, allocation=allocation, include="a.weight")
    assert alone.prune == 0
    for asked in range(0, 100, 7):
        plan = secateur.plan(w, asked / 100, allocation=allocation, **named)  # type: ignore[arg-type]
        assert plan.prune == round(Fraction(asked, 100) * 28)


def test_uniform_plus_that_cannot_be_names_its_own_rules() -> None:
    conv = torch.nn.Conv2d(3, 8, 3)
    for model, s in ((torch.nn.Sequential(conv, torch.nn.Linear(8, 8), torch.nn.Linear(8, 10)), 0.95), (conv, 0.5)):
        with pytest.raises(
            Infeasible, match=r'rules of "uniform_plus" \(a first convolution stays dense, .* at most 80 %'
        ):
            secateur.prune(model, s, allocation="uniform_plus")
        with pytest.raises(Infeasible) as e:
            secateur.prune(model, s, allocation="uniform_plus")
        assert "max_sparsity" not in str(e.value)
    with pytest.raises(Infeasible, match=r'"uniform_plus" .* with max_sparsity and min_keep allow only'):
        secateur.prune(conv, 0.5, allocation="uniform_plus", min_keep=3)
