"""The table holds everything public, and what it calls undefined is refused with the reason before anything is read."""

from __future__ import annotations

import pytest
import torch

import secateur
from secateur.core import combine
from secateur.core.criteria import PROVIDED
from secateur.core.keys import FORMATS
from secateur.core.patterns import REDUCTIONS
from secateur.core.request import NONFINITE as MODES
from secateur.core.spelling import ALLOCATIONS as NAMED
from tests.contract.nets import net, snapshot
from tests.contract.table import (
    ALLOCATIONS,
    CRITERIA,
    DEFINED,
    DTYPES,
    EVERYTHING,
    NONFINITE,
    OF_ATTENTION,
    PATTERNS,
    PLAIN,
    REFUSED,
    centred,
)
from tests.contract.test_units import REDUCED


def test_every_public_pattern_is_in_the_table() -> None:
    public = {o for o in vars(secateur).values() if isinstance(o, type) and hasattr(o, "why_not")}
    assert public == {type(p) for p in (PATTERNS | OF_ATTENTION).values()}
    assert {p.side for p in PATTERNS.values() if isinstance(p, secateur.Channel)} == {"out", "in"}


def test_every_public_criterion_is_in_the_table() -> None:
    given = {"magnitude": secateur.magnitude, "random": secateur.random, "elementwise": secateur.elementwise}
    criteria = {o for o in vars(secateur).values() if getattr(o, "__module__", "") == "secateur.core.criteria"}
    assert criteria == set(given.values())
    assert set(CRITERIA) == {*given, "function"}
    assert set(PROVIDED) <= set(centred.__annotations__)  # the user's criterion asks for all that is offered


def test_every_allocation_dtype_mode_and_reduction_is_in_the_table() -> None:
    assert set(ALLOCATIONS) == {*NAMED, "mapping", "function"}
    assert {d for d in DTYPES.values() if isinstance(d, torch.dtype)} == set(FORMATS)
    assert NONFINITE == MODES
    assert set(REDUCED) == set(REDUCTIONS)


def test_every_choice_that_can_be_refused_is_varied() -> None:
    varied = {"pattern", "allocation", "criterion", "nonfinite", "sparsity", "threshold", "caps"}
    assert set(combine.Choice.__dataclass_fields__) == varied
    assert len(EVERYTHING) == len(set(EVERYTHING)) == len(DEFINED) + len(REFUSED)
    assert {c.pattern for c in PLAIN} == set(PATTERNS)
    assert {c.allocation for c in PLAIN} == set(ALLOCATIONS)
    assert {c.criterion for c in PLAIN} == set(CRITERIA)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_not_defined_is_refused_with_the_reason(pattern: str, allocation: str) -> None:
    for case in [c for c in REFUSED if (c.pattern, c.allocation) == (pattern, allocation)]:
        reason = case.why_refused()
        assert reason is not None
        assert len(reason) > 40
        for verb in (secateur.plan, secateur.prune):
            with pytest.raises(secateur.NotDefined) as refused:
                verb({}, **case.asked())  # nothing is read: there is nothing to read
            assert str(refused.value) == f"{reason}.", case


def test_a_refused_combination_touches_nothing() -> None:
    model = net()
    before = snapshot(model)
    for case in REFUSED[:: len(REFUSED) // 40]:
        with pytest.raises(secateur.NotDefined):
            secateur.prune(model, **case.asked())
    assert snapshot(model) == before


def test_nothing_asked_is_refused() -> None:
    for allocation in ALLOCATIONS:
        if allocation != "mapping":
            with pytest.raises(secateur.BadInput, match=r"say how much to prune: sparsity=0\.9"):
                secateur.plan(net(), allocation=ALLOCATIONS[allocation])


def test_a_mapping_that_covers_all_needs_no_sparsity() -> None:
    assert secateur.plan(net(), allocation={"*": 0.5}).prune == 240
    with pytest.raises(secateur.BadInput, match=r"says nothing of 'fc1.weight'.*give sparsity= for the rest"):
        secateur.plan(net(), allocation={"conv": 0.5, "fc2": 0.5})


def test_equal_sparsity_may_be_said_with_groups() -> None:
    assert secateur.plan(net(), 0.5, pattern="2:4").prune == 240
    with pytest.raises(secateur.NotDefined, match=r"2:4 means sparsity 0.5; got sparsity=0.6. Leave sparsity out"):
        secateur.plan(net(), 0.6, pattern="2:4")
