"""Units: integer sums that do not depend on order, powers of two, which units fit, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur.core.keys import LOWEST
from secateur.core.patterns import Channel
from secateur.core.select import Cut, identity
from secateur.core.types import Spec
from secateur.core.units import UnitTable, agree, exponent, larger, rounded, smallest_units, times_power, units_gone
from secateur.errors import BadTensor, Infeasible
from tests.property.worlds import Exchange, Pieces, example, selecting, whole


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=6))
def test_the_smallest_power_above_all(values: list[float]) -> None:
    e = exponent(torch.tensor(values, dtype=torch.float64))
    largest = max((abs(v) for v in values), default=0.0)
    if largest == 0:
        assert e is None
    else:
        assert e is not None and Fraction(2) ** (e - 1) <= Fraction(largest) < Fraction(2) ** e


def test_the_larger_exponent_and_what_workers_agree_on() -> None:
    assert larger(None, None) is None and larger(3, None) == 3 and larger(None, -7) == -7 and larger(2, 5) == 5
    for mine in ([None, None], [None, -1073], [1024, 3], [-5, -4]):
        found = Exchange(2).run(lambda w, reduce, mine=mine: agree(mine[w], reduce))  # type: ignore[misc]
        assert found == [max((e for e in mine if e is not None), default=0)] * 2


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-1074, 1024))
def test_powers_of_two_are_exact_while_they_fit(value: float, power: int) -> None:
    exact = Fraction(value) * Fraction(2) ** power
    got = float(times_power(torch.tensor([value], dtype=torch.float64), power)[0])
    if exact and Fraction(2) ** -1022 <= abs(exact) < Fraction(2) ** 1023:
        assert Fraction(got) == exact


@given(st.floats(-1, 1), st.integers(0, 62))
def test_rounding_is_half_to_even(value: float, bits: int) -> None:
    got = int(rounded(torch.tensor([value], dtype=torch.float64), bits)[0])
    assert got == round(Fraction(value) * 2**bits)


def table(name: str, shape: tuple[int, int], keys: list[int]) -> UnitTable:
    spec = Spec(name, shape, torch.float32, "linear", out_dim=0, in_dim=1)
    live = torch.tensor([0 if k == LOWEST else shape[1] for k in keys])
    return UnitTable(spec, Channel("out").grid(spec), torch.tensor(keys), live)


def test_units_are_taken_in_order_while_they_fit() -> None:
    """Units of 3 and of 2 weights with keys 5, 1, 5 and 5, zero: order is b1 (zero), a1, a0, a2, b0."""
    tables = [table("a", (3, 3), [5, 1, 5]), table("b", (2, 2), [5, LOWEST])]
    went = []
    for count in range(14):
        cuts = smallest_units(tables, count, [None, None])
        went.append([units_gone(t, c).int().tolist() for t, c in zip(tables, cuts, strict=True)])
    steps = {
        0: [[0, 0, 0], [0, 1]],
        5: [[0, 1, 0], [0, 1]],
        8: [[1, 1, 0], [0, 1]],
        11: [[1, 1, 1], [0, 1]],
        13: [[1, 1, 1], [1, 1]],
    }
    for count, got in enumerate(went):
        assert got == steps[max(s for s in steps if s <= count)], count


def test_nothing_to_take_and_no_tables() -> None:
    assert smallest_units([], 5, []) == []
    assert smallest_units([table("a", (1, 3), [7])], 2, [None]) == [Cut(LOWEST + 1, 0)]


def test_units_of_a_tensor_at_its_cap_are_passed_over() -> None:
    tables = [table("a", (3, 3), [1, 2, 3]), table("b", (2, 2), [4, 5])]
    for most, counts in ((0, [0, 2]), (3, [1, 2]), (5, [1, 2]), (6, [2, 2]), (None, [3, 2])):
        weights = 3 * counts[0] + 2 * counts[1]
        for count in (weights, weights + 2):
            cuts = smallest_units(tables, count, [most, None])
            assert [int(units_gone(t, c).sum()) for t, c in zip(tables, cuts, strict=True)] == counts
        if most is not None:
            with pytest.raises(Infeasible, match=f"{weights + 3} of 13 .* in whole units .* allow only {weights} "):
                smallest_units(tables, weights + 3, [most, None])


@pytest.mark.parametrize("reduce", ["mean", "l1", "l2"])
def test_sums_do_not_depend_on_how_they_are_cut(reduce: str) -> None:
    """Values over many binary orders: in floats, the sums of these would differ with their order."""
    t = {"w": example((6, 500), torch.float32, "normal") ** 9}
    spec = Spec("w", (6, 500), torch.float32, "linear", out_dim=0, in_dim=1)
    pattern = secateur.Channel("out", reduce)  # type: ignore[arg-type]
    keys = [
        selecting(parts, pattern).table(spec).keys  # type: ignore[attr-defined]
        for parts in (whole(t), Pieces(t, 7).parts, Pieces(t, 131, strided=True).parts)
    ]
    assert torch.equal(keys[0], keys[1]) and torch.equal(keys[0], keys[2])


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**100, 1.0])
def test_scores_compare_over_tensors_of_any_scale(scale: float) -> None:
    """The sums of each tensor are scaled by its own largest; the scores are in the weights' own unit again."""
    w = {"a.weight": torch.full((2, 4), 100.0) * scale, "b.weight": torch.full((2, 2), 0.9) * scale}
    w["a.weight"][1] = 1.0 * scale
    w["b.weight"][1] = 0.8 * scale
    secateur.prune(w, 0.17, pattern="channel")
    assert (w["b.weight"] == 0).all(1).tolist() == [False, True] and bool((w["a.weight"] != 0).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pattern", ["2x2", "channel", "channel:in"])
def test_scores_that_have_no_sum_are_refused(bad: float, pattern: str) -> None:
    w = {"fc.weight": torch.arange(1.0, 17).view(4, 4)}
    with pytest.raises(BadTensor, match=r"NaN or infinite scores for 'fc\.weight'"):
        secateur.prune(w, 0.5, criterion=lambda weight: weight.index_fill(0, torch.tensor([0]), bad), pattern=pattern)
    assert bool((w["fc.weight"] != 0).all())


def test_units_that_hold_what_is_no_number() -> None:
    w = torch.tensor([[torch.nan, 1.0], [2.0, 3.0], [4.0, torch.inf], [0.5, 0.5]])
    kept = {"fc.weight": w.clone()}
    secateur.prune(kept, 0.5, pattern="channel", nonfinite="keep")
    assert (kept["fc.weight"] == 0).all(1).tolist() == [False, True, False, True]
    with pytest.raises(Infeasible, match="NaN or infinite"):
        secateur.prune({"fc.weight": w.clone()}, 0.75, pattern="channel", nonfinite="keep")


def test_zero_units_come_first_whatever_the_score() -> None:
    w = {"fc.weight": torch.tensor([[1.0, 1.0], [0.0, -0.0], [2.0, 2.0]])}
    secateur.prune(w, 0.34, pattern="channel", criterion=lambda weight: -weight)
    assert (w["fc.weight"] == 0).all(1).tolist() == [False, True, False]


def test_reduce_of_one_worker_is_the_identity() -> None:
    t = torch.arange(3)
    assert identity(t) is t


def lowest_largest(weight: torch.Tensor) -> torch.Tensor:
    """All scores negative: the largest weights go first."""
    return -weight.abs()


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", {"*": 0.5}])
@pytest.mark.parametrize("pattern", ["channel", "1x2", secateur.Channel("out", "max"), secateur.Channel("out", "mean")])
def test_higher_is_kept_also_of_negative_scores(pattern: Any, allocation: Any) -> None:
    w = {"a.weight": torch.tensor([[1.0, 1.0], [5.0, 5.0]])}
    secateur.prune(w, 0.5, criterion=lowest_largest, pattern=pattern, allocation=allocation)
    assert w["a.weight"].tolist() == [[1, 1], [0, 0]]


def test_a_zero_weight_does_not_keep_its_unit() -> None:
    w = torch.tensor([[0.0, 5.0], [4.0, 4.0]])
    secateur.prune(w, 0.5, criterion=lowest_largest, pattern=secateur.Channel("out", "max"))
    assert w.tolist() == [[0, 0], [4, 4]]


@pytest.mark.parametrize("reduce", ["l1", "l2"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_norms_of_negative_scores_are_refused(reduce: Any, allocation: str) -> None:
    w = {"a.weight": torch.tensor([[1.0, 2.0], [1.0, 2.0]])}
    with pytest.raises(
        BadTensor, match=rf"negative scores for 'a\.weight' .*, and {reduce} is a norm.*say reduce=\"mean\""
    ):
        secateur.prune(w, 0.5, criterion=lowest_largest, pattern=secateur.Channel("out", reduce), allocation=allocation)
    assert w["a.weight"].tolist() == [[1, 2], [1, 2]]
    positive = secateur.prune(w, 0.5, criterion=lambda weight: weight**2, pattern=secateur.Channel("out", reduce))
    assert positive.zeros == 2


@pytest.mark.parametrize("criterion", ["magnitude", lambda weight: weight.abs()])
@pytest.mark.parametrize("first", [True, False])
def test_a_tied_weight_takes_the_bias_of_each_of_its_layers(criterion: Any, first: bool) -> None:
    a, b, c = torch.nn.Linear(4, 4, bias=first), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    b.weight = c.weight = a.weight
    c.bias = b.bias
    for p in (*a.parameters(), b.bias):
        p.data = torch.arange(1.0, p.numel() + 1).view(p.shape)
    model = torch.nn.Sequential(a, b, c)
    plan = secateur.plan(model, 0.5, pattern="channel", criterion=criterion)
    assert [m.name for m in plan.chosen[0].followers] == (["0.bias", "1.bias"] if first else ["1.bias"])
    secateur.apply(plan, model)
    for layer in model:
        assert not layer.weight[:2].any() and bool(layer.weight[2:].all())
        assert layer.bias is None or layer.bias.tolist() == [0, 0, 3, 4]
