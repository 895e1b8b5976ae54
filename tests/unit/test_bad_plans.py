"""Masks and plans that do not fit, or were changed by hand, are refused whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

import secateur
from secateur.errors import BadInput, BadTensor, PlanMismatch
from tests.unit.refusals import net, refused, state


def test_masks_that_do_not_fit() -> None:
    good = torch.ones(6, 4, dtype=torch.bool)
    table: list[tuple[Any, type[Exception], str]] = [
        ({"fc.weight": good}, PlanMismatch, "mask for 'fc.weight', but the target has no such tensor; it has 0.bias, 0.weight"),
        ({"0.weight": good.t()}, PlanMismatch, r"mask of '0.weight' \(shape \(6, 4\), float32\).*got \(4, 6\), torch.bool"),
        ({"0.weight": good.float()}, PlanMismatch, r"bool tensor of its shape, True = keep; got \(6, 4\), torch.float32"),
        ({"0.weight": good.numpy()}, PlanMismatch, "got ndarray"),
        ({"0.weight": good.tolist()}, PlanMismatch, "got list"),
        ({"0.weight": good.to("meta")}, PlanMismatch, "0.weight.*meta"),
        ({"2.weight": torch.ones(2, 6, dtype=torch.bool), "0.weight": good[:5]}, PlanMismatch, r"got \(5, 4\)"),
        ({}, BadInput, "an empty dict of masks: give a bool tensor for at least one tensor"),
        (good, BadInput, "got Tensor"),
        (secateur.inspect(net()), BadInput, "got Report"),
        (None, BadInput, "got NoneType"),
    ]  # fmt: skip
    for masks, error, text in table:
        refused(error, text, lambda m, masks=masks: secateur.apply(masks, m))  # type: ignore[misc]


def test_two_masks_for_one_tensor() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    mask = torch.ones(2, 2, dtype=torch.bool)
    refused(PlanMismatch, "another name of '0.weight', which has a mask already",
            lambda m: secateur.apply({"0.weight": mask, "1.weight": mask}, m), model)  # fmt: skip


def test_a_plan_whose_values_have_changed() -> None:
    model = net()
    plan = secateur.plan(model, 0.5)
    model[2].weight.data *= 0.01
    text = r"at the plan's cut \d+ weights of '2.weight' \(shape \(2, 6\), float32\) would be zero, where the plan says \d+"
    refused(PlanMismatch, text, lambda m: secateur.apply(plan, m), model)
    for pattern in ("2x2", "channel"):
        again = net()
        made = secateur.plan(again, 0.5, pattern=pattern, allocation="uniform")
        again[2].weight.data *= 40
        refused(PlanMismatch, "where the plan says", lambda m, made=made: secateur.apply(made, m), again)  # type: ignore[misc]


def test_a_plan_that_meets_nan_later() -> None:
    model = net()
    plan = secateur.plan(model, 0.5)
    model[2].weight.data[0, 0] = math.nan
    with pytest.raises(BadTensor, match=r"'2.weight' .*holds 1 NaN"):
        secateur.apply(plan, model)
    assert not bool((model[0].weight == 0).any())


NOT_A_PLAN = [
    "", "[]", "{}", "null", "nonsense", '{"secateur_plan": 1}', '{"secateur_plan": "1"}',
    '{"secateur_plan": 1, "rows": [1]}', '{"secateur_plan": {}}',
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_A_PLAN)
def test_texts_that_are_no_plan(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a plan of secateur"):
        secateur.Plan.from_json(text)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(BadInput, match="not a plan of secateur"):
        secateur.load_plan(tmp_path / "plan.json")


def changed(key: str, value: Any) -> str:
    import json

    head = json.loads(secateur.plan(net(), 0.5).to_json())
    part = head
    *path, last = key.split("/")
    for step in path:
        part = part[int(step) if step.isdigit() else step]
    part[last] = value
    return json.dumps(head)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("secateur_plan", 2), ("pattern", "diagonal"), ("pattern", 3), ("reduce", "median"), ("rows", None), ("rows", {"a": 1}),
        ("rows/1/shape", "ab"), ("rows/1/dtype", "float33"), ("rows/1/dtype", "save"), ("rows/1/cut", {"key": 1}),
        ("rows/1/cut", None), ("rows/1/unknown", 1), ("rows/1/prune", "many"), ("criterion", "l1"), ("nonfinite", "maybe"),
        ("warnings", None), ("carries_masks", True),
    ],
)  # fmt: skip
def test_plans_that_were_changed_by_hand(key: str, value: Any) -> None:
    """Whether the text or the plan is refused, nothing is written, and the error is one of ours."""
    model = net()
    before = state(model)
    with pytest.raises((BadInput, PlanMismatch)):
        secateur.apply(secateur.Plan.from_json(changed(key, value)), model)
    assert state(model) == before


ODD = [
    ("rows/1/cut/key", "abc"), ("rows/1/cut/key", 1e30), ("rows/1/cut/key", 1.5), ("rows/1/cut/key", True),
    ("rows/1/cut/key", 1 << 63), ("rows/1/cut/index", -1), ("rows/1/cut/index", 0.5), ("rows/1/cut/index", 25),
    ("rows/1/cut/level", 1), ("pattern", "2:4"), ("pattern", "5x5"), ("criterion", "random(x)"), ("criterion", "l1"),
    ("criterion", 3), ("rows/1/name", "0.bias"), ("rows/1/name", 1), ("rows/1/aliases", ["2.weight"]),
    ("rows/1/shape", [6, -4]), ("rows/1/shape", [6, 4.0]), ("rows/1/out_dim", 2), ("rows/1/in_dim", "x"),
    ("rows/1/batch_dims", [7]), ("rows/1/prune", 25), ("rows/1/prune", -1), ("rows/1/zeros", 0.5), ("rows/1/dtype", "int8"),
    ("sparsity", "half"), ("threshold", True), ("warnings", [1]), ("rows/1/followers", [3]), ("allocation", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), ODD)
def test_a_text_that_no_plan_writes_is_refused_when_it_is_read(key: str, value: Any) -> None:
    secateur.Plan.from_json(secateur.plan(net(), 0.5).to_json())
    with pytest.raises(BadInput, match="not a plan of secateur"):
        secateur.Plan.from_json(changed(key, value))


@pytest.mark.parametrize("what", ["length", "dtype", "missing", "shape"])
def test_masks_of_another_kind(what: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = secateur.plan(net(), 0.5, criterion=lambda weight: -weight)
    assert plan.masks is not None
    masks = {n: b.clone() for n, b in plan.masks.items()}
    bits = masks.pop("0.weight")
    if what != "missing":
        masks["0.weight"] = {"length": bits[:-1].clone(), "dtype": bits.float(), "shape": bits[None].clone()}[what]
    secateur.save_plan(plan, path)
    raw = save(masks)  # by someone who knows how masks are named
    digest = hashlib.sha256(raw).hexdigest()
    path.with_name(f"plan.json.{digest[:16]}.masks.safetensors").write_bytes(raw)
    path.write_text(json.dumps({**json.loads(path.read_text()), "masks_sha256": digest}))
    with pytest.raises(BadInput, match=r"do not hold that of '0\.weight'"):
        secateur.load_plan(path)
    with pytest.raises(BadInput, match=r"do not hold that of '0\.weight'"):
        secateur.Plan.from_json(plan.to_json(), masks)


def test_plans_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(BadInput, match="no plan at"):
        secateur.load_plan(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput):
        secateur.load_plan(path)
    path.unlink()
    plan = secateur.plan(net(), 0.5, criterion=lambda weight: -weight)
    secateur.save_plan(plan, path)
    with pytest.raises(secateur.OutputExists, match="already there"):
        secateur.save_plan(plan, path)
    (masks,) = tmp_path.glob("plan.json.*.masks.safetensors")
    whole = masks.read_bytes()
    masks.write_bytes(whole[:-3])
    with pytest.raises(BadInput):
        secateur.load_plan(path)
    masks.unlink()
    with pytest.raises(BadInput, match="carries its masks in a safetensors file beside"):
        secateur.load_plan(path)


def test_masks_of_another_plan_are_refused(tmp_path: Path) -> None:
    weights = [{"fc.weight": torch.randn(8, 8)} for _ in range(2)]
    for i, w in enumerate(weights):
        secateur.save_plan(secateur.plan(w, 0.5, criterion=lambda weight: -weight), tmp_path / f"{i}.json")
    first, second = sorted(tmp_path.glob("*.masks.safetensors"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(BadInput, match="does not hold the masks of the plan"):
        secateur.load_plan(tmp_path / "0.json")
    changed = json.loads((tmp_path / "1.json").read_text()) | {"masks_sha256": "../../x"}
    (tmp_path / "1.json").write_text(json.dumps(changed))
    with pytest.raises(BadInput, match="is no sha256"):
        secateur.load_plan(tmp_path / "1.json")


@pytest.mark.parametrize("new_masks", [True, False])
def test_an_interrupted_save_leaves_the_old_plan_or_the_new_one(new_masks: bool, tmp_path: Path) -> None:
    path, w = tmp_path / "plan.json", {"fc.weight": torch.randn(8, 8)}
    old = secateur.plan(w, 0.25, criterion=lambda weight: -weight)
    new = secateur.plan(w, 0.75, criterion=(lambda weight: -weight) if new_masks else "magnitude")
    steps = [
        (os, "fsync"),
        (os, "link"),
        (Path, "write_bytes"),
        (Path, "write_text"),
        (Path, "replace"),
        (Path, "unlink"),
    ]
    for n in range(100):
        secateur.save_plan(old, path, overwrite=True)
        left = iter([None] * n)

        def wrapped(real: Any, left: Iterator[None] = left) -> Any:
            def step(*args: Any, **kwargs: Any) -> Any:
                if next(left, "now") is not None:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            return step

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, wrapped(getattr(owner, name)))
            try:
                secateur.save_plan(new, path, overwrite=True)
                done = True
            except KeyboardInterrupt:
                done = False
        found = secateur.load_plan(path)
        kept = old if found == old else new
        assert found == kept
        assert (found.masks is None) == (kept.masks is None)
        for name, bits in (kept.masks or {}).items():
            assert torch.equal((found.masks or {})[name], bits)
        if done:
            break
    assert n == (10 if new_masks else 5)  # each of them was the last once
    assert found == new
    assert len(list(tmp_path.glob("plan*"))) == 1 + new_masks


def test_a_plan_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "config.json").write_text("mine")
    with pytest.raises(BadInput, match="is a folder"):
        secateur.save_plan(secateur.plan(net(), 0.5), tmp_path / "plan", overwrite=True)
    assert (tmp_path / "plan" / "config.json").read_text() == "mine"


def test_a_plan_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("mine")
    with pytest.raises(secateur.OutputExists):
        secateur.save_plan(secateur.plan(net(), 0.5, criterion=lambda weight: -weight), path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("plan.json", "mine")]
