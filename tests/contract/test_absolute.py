"""Promise 3: sparsity is absolute and masks are nested, wherever scores do not change between the two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from tests.contract.nets import CHOSEN, Kind, is_zero, net, snapshot
from tests.contract.table import PLAIN, Case, expected_warnings, ids, in_turn

STEPS = (0.2, 0.5, 0.7)
"""Feasible for every allocation on the test network."""


def kinds(case: Case) -> Sequence[tuple[str, Kind]]:
    both: list[tuple[str, Kind]] = [("float32", "plain"), ("bfloat16", "ties")]
    return in_turn(case, both)


def prune(target: Any, case: Case, s: float) -> secateur.Report:
    with expected_warnings():
        return secateur.prune(target, **case.asked(s))


def zeros(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: is_zero(model.get_parameter(n)) for n in CHOSEN}


@pytest.mark.parametrize("case", PLAIN, ids=ids(PLAIN))
def test_twice_is_once(case: Case) -> None:
    for dtype, kind in kinds(case):
        model = net(dtype, kind)
        first = prune(model, case, 0.5)
        after = snapshot(model)
        second = prune(model, case, 0.5)
        assert (second.zeros, second.sparsity) == (first.zeros, first.sparsity)
        assert snapshot(model) == after


@pytest.mark.parametrize("case", PLAIN, ids=ids(PLAIN))
def test_masks_are_nested_and_steps_lead_where_one_step_leads(case: Case) -> None:
    """`centred` looks at the whole tensor, so its scores change with what is zero: nested, but not in steps."""
    for dtype, kind in kinds(case):
        step_by_step = net(dtype, kind)
        direct = []
        for s in STEPS:
            model = net(dtype, kind)
            prune(model, case, s)
            direct.append(zeros(model))
            prune(step_by_step, case, s)
            if case.criterion != "function":
                assert snapshot(step_by_step) == snapshot(model), s
        for sparser, denser in pairwise(direct):
            assert all(bool((sparser[n] <= denser[n]).all()) for n in CHOSEN)


@pytest.mark.parametrize("case", PLAIN, ids=ids(PLAIN))
def test_what_is_zero_stays_zero(case: Case) -> None:
    """Pruning for less than is zero already prunes nothing more, and the report shows asked and found."""
    model = net("bfloat16", "ties")
    prune(model, case, 0.7)
    after = snapshot(model)
    report = prune(model, case, 0.2)
    assert snapshot(model) == after
    assert report.zeros == sum(int(z.sum()) for z in zeros(model).values())
    assert all(r.asked is None or r.asked <= (r.zeros or 0) for r in report.chosen)


def test_more_is_zero_than_asked() -> None:
    model = net("bfloat16", "ties")
    secateur.prune(model, 0.7)
    report = secateur.prune(model, 0.5)
    assert report.asked["sparsity"] == 0.5
    assert report.sparsity == 0.7
    report = secateur.prune(model, 0.5, allocation="uniform")
    assert {r.name: r.asked for r in report.chosen} == {"conv.weight": 48, "fc1.weight": 128, "fc2.weight": 64}
    assert report.zeros == 336


def test_thresholds_are_nested_and_absolute() -> None:
    before: dict[str, Tensor] = {}
    stepped = net()
    for t in (0.1, 0.4, 1.0):
        model = net()
        secateur.prune(model, threshold=t)
        secateur.prune(stepped, threshold=t)
        assert snapshot(stepped) == snapshot(model)
        found = zeros(model)
        assert all(bool((before.get(n, found[n]) <= found[n]).all()) for n in CHOSEN)
        before = found


def test_a_zero_comes_first_whatever_the_criterion() -> None:
    w = torch.tensor([5.0, 0.0, -3.0, 0.0])

    def zeros_last(weight: Tensor) -> Tensor:
        return (weight == 0).float() - weight.abs() / 100

    secateur.prune(w, 0.5, criterion=zeros_last)
    assert w.tolist() == [5.0, 0.0, -3.0, 0.0]
    secateur.prune(w, 0.75, criterion=secateur.elementwise(lambda weight: -weight))
    assert w.tolist() == [0.0, 0.0, -3.0, 0.0]
