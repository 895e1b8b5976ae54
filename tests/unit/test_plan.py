"""Plans as data: JSON both ways, masks as bits, and masks computed part by part from the plan alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur import Plan
from secateur.core.bits import pack, unpack
from secateur.core.plan import gone, keep_mask
from secateur.core.types import Part
from secateur.errors import BadInput, PlanMismatch, SecateurWarning
from tests.property.worlds import example


def weights() -> dict[str, Tensor]:
    return {
        "a.weight": example((8, 12), torch.float32, seed=1),
        "b.weight": example((4, 16), torch.bfloat16, seed=2),
        "c.weight": example((12, 8), torch.float64, "few values"),
        "d.bias": torch.ones(4),
    }


ASKED: list[dict[str, Any]] = [
    {"sparsity": 0.5},
    {"sparsity": 0.1 + 0.2, "criterion": "random"},
    {"sparsity": 0.5, "allocation": "lamp"},
    {"threshold": 0.3},
    {"pattern": "2:4"},
    {"sparsity": 0.4, "pattern": "2x4"},
    {"sparsity": 0.4, "pattern": secateur.Channel("in", "max")},
    {"allocation": {"a": 0.5, "*.weight": 0.5}},
    {"sparsity": 0.5, "max_sparsity": {"b": 0.2}},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_json_and_back(asked: dict[str, Any]) -> None:
    w = weights()
    plan = secateur.plan(w, **asked)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json() and again.masks is None
    assert str(again) == str(plan) and str(plan.prune) in str(plan)
    one, other = ({k: t.clone() for k, t in w.items()} for _ in range(2))
    reports = secateur.apply(again, one), secateur.apply(plan, other)
    assert reports[0].zeros == reports[1].zeros == plan.prune
    assert all(torch.equal(one[k], other[k]) for k in w)
    json.loads(plan.to_json(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_a_plan_of_a_function_carries_masks() -> None:
    w = weights()
    plan = secateur.plan(w, 0.5, criterion=lambda weight: -weight.float())
    assert plan.masks is not None and {k: m.dtype for k, m in plan.masks.items()} == dict.fromkeys(
        plan.masks, torch.uint8
    )
    assert [plan.masks[r.name].numel() for r in plan.chosen] == [(r.numel + 7) // 8 for r in plan.chosen]
    with pytest.raises(BadInput, match="carries its masks"):
        Plan.from_json(plan.to_json())
    again = Plan.from_json(plan.to_json(), plan.masks)
    assert again == plan
    for r in plan.chosen:
        flat = w[r.name].reshape(-1)
        keep = torch.cat([keep_mask(again, Part(r.spec, flat[a : a + 13], a)) for a in range(0, r.numel, 13)])
        order = torch.randperm(r.numel)
        assert torch.equal(keep_mask(again, Part(r.spec, flat[order], order)), keep[order])
        assert r.prune == int((~keep).sum())
    secateur.apply(again, w)
    assert sum(int((w[r.name] == 0).sum()) for r in plan.chosen) == plan.prune


@given(st.integers(0, 70), st.data())
def test_bits_are_packed_lowest_first(n: int, data: st.DataObject) -> None:
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    bits = pack(keep)
    assert bits.numel() == (n + 7) // 8
    assert all(bool(bits[i // 8] >> (i % 8) & 1) == bool(keep[i]) for i in range(n))
    start = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - start))
    assert torch.equal(unpack(bits, start, count), keep[start : start + count])


@pytest.mark.parametrize("asked", ASKED[:5], ids=str)
def test_a_mask_part_by_part(asked: dict[str, Any]) -> None:
    """Chunks, rows and scattered elements give their part of the one mask; here rows hold whole groups."""
    w = weights()
    plan = secateur.plan(w, **asked)
    for r in plan.chosen:
        t = w[r.name]
        whole = keep_mask(plan, Part(r.spec, t))
        assert whole.shape == t.shape and int((~whole).sum()) == r.prune
        rows = [keep_mask(plan, Part(r.spec, t[i], i * t.shape[1])) for i in range(t.shape[0])]
        assert torch.equal(torch.stack(rows), whole)
        assert torch.equal(keep_mask(plan, Part(r.spec, t.t().contiguous().t())), whole)
        if r.cut is not None and r.cut.level is None:
            at = torch.arange(r.numel).view(t.shape)
            assert torch.equal(keep_mask(plan, Part(r.spec, t[:, 1::3], at[:, 1::3])), whole[:, 1::3])


def test_a_mask_by_another_name_and_of_others() -> None:
    shared = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.ModuleDict({"a": shared, "b": shared, "c": torch.nn.Linear(4, 4)})
    plan = secateur.plan(model, 0.5)
    row = next(r for r in plan.rows if r.name == "a.weight")
    assert row.aliases == ("b.weight",)
    alias = secateur.core.types.Spec("b.weight", (4, 4), torch.float32, "linear")
    assert torch.equal(keep_mask(plan, Part(alias, shared.weight)), keep_mask(plan, Part(row.spec, shared.weight)))
    for name, shape, dtype in (
        ("x.weight", (4, 4), torch.float32),
        ("a.weight", (2, 8), torch.float32),
        ("a.weight", (4, 4), torch.float64),
        ("c.bias", (4,), torch.float32),
    ):
        other = secateur.core.types.Spec(name, shape, dtype, "linear")
        with pytest.raises(PlanMismatch, match="does not prune"):
            keep_mask(plan, Part(other, torch.ones(shape, dtype=dtype)))


def broken() -> dict[str, str]:
    good = json.loads(secateur.plan(weights(), 0.5).to_json())

    def but(**changes: Any) -> str:
        return json.dumps(good | changes)

    row = good["rows"][0]
    return {
        "no JSON": "plan",
        "no object": "[]",
        "null": "null",
        "empty": "{}",
        "newer": but(secateur_plan=99),
        "odd version": but(secateur_plan="1"),
        "rows no list": but(rows=3),
        "row no object": but(rows=[1]),
        "row with more": but(rows=[row | {"color": "red"}]),
        "row without a name": but(rows=[{k: v for k, v in row.items() if k != "name"}]),
        "odd cut": but(rows=[row | {"cut": {"depth": 1}}]),
        "odd pattern": but(pattern="9:4"),
        "odd reduction": but(pattern="4x4", reduce="sum"),
        "reduction of none": but(reduce="mean"),
        "no warnings": but(warnings=None),
    }


@pytest.mark.parametrize("kind", broken())
def test_what_is_no_plan_is_refused(kind: str) -> None:
    with pytest.raises(BadInput):
        Plan.from_json(broken()[kind])


def test_what_a_plan_says() -> None:
    w = weights()
    plan = secateur.plan(w, 0.5)
    assert (plan.total, plan.prune) == (96 + 64 + 96, 128)
    assert [r.name for r in plan.rows] == sorted(w) and [r.name for r in plan.chosen] == sorted(w)[:3]
    skipped = plan.rows[3]
    assert skipped.skip == "a bias" and skipped.cut is None and skipped.prune is None and skipped.sparsity is None
    for r in plan.chosen:
        assert r.prune is not None and r.sparsity == r.prune / r.numel and r.spec.dtype == w[r.name].dtype
        out = torch.cat([g for _, g in gone(plan, r, lambda s, a: [Part(s, w[s.name])])])
        assert int(out.sum()) == r.prune
        survivors = w[r.name].reshape(-1)[~out].abs()
        assert r.threshold == float(survivors[survivors != 0].min())


def test_a_tensor_left_with_nothing_is_a_warning_in_the_plan() -> None:
    w = {"a.weight": torch.full((2, 2), 0.1), "b.weight": torch.ones(4, 4)}
    with pytest.warns(SecateurWarning, match=r"left with nothing: a\.weight"):
        plan = secateur.plan(w, 0.2)
    assert len(plan.warnings) == 1 and Plan.from_json(plan.to_json()).warnings == plan.warnings
    assert plan.rows[0].threshold is None


def test_a_plan_of_values_that_have_changed_is_refused() -> None:
    w = weights()
    plan = secateur.plan(w, 0.5)
    w["a.weight"] += 1
    before = {k: t.clone() for k, t in w.items()}
    with pytest.raises(PlanMismatch, match=r"a\.weight"):
        secateur.apply(plan, w)
    assert all(np.array_equal(before[k].double(), w[k].double()) for k in w)
