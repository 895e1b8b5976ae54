"""Heads of attention: units that span tensors, against slices written out by hand, and the promises of all patterns."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import secateur
from secateur.core.heads import Head
from tests.contract import heads, oracle
from tests.contract.disk import load, save_one, save_shards
from tests.contract.heads import BIASES, CHOSEN, LAYERS, LEFT, PATTERN, attentive, masks, pool_of, size_of, units_gone
from tests.contract.nets import bits, is_zero, snapshot, tensors
from tests.contract.table import ALLOCATIONS, CRITERIA, DTYPES, expected_warnings

TOTAL = sum(size_of(layer) for layer in LAYERS)
LARGEST = max(size for layer in LAYERS for size in heads.unit_sizes(layer))
DEFINED = [(a, c) for a, c in product(ALLOCATIONS, CRITERIA) if a != "lamp"]


def halves(rows: Any, sparsity: float) -> dict[str, int]:
    """A user's allocation; its rows are layers."""
    assert [r.name for r in rows] == list(LAYERS) and sum(r.numel for r in rows) == TOTAL
    return {r.name: int(r.numel * sparsity / 2) for r in rows}


def asked(allocation: str, criterion: str = "magnitude", s: float = 0.4, **more: Any) -> dict[str, Any]:
    own = {"mapping": {"bert": 0.25, "*attn*": 0.75, "mha": 0.5}, "function": halves}.get(
        allocation, ALLOCATIONS[allocation]
    )
    return {"sparsity": s, "pattern": PATTERN, "allocation": own, "criterion": CRITERIA[criterion], **more}


def zeros(model: nn.Module) -> dict[str, Any]:
    return {n: is_zero(model.get_parameter(n)).numpy() for n in CHOSEN}


def prune(target: Any, **how: Any) -> secateur.Report:
    with expected_warnings():
        return secateur.prune(target, **how)


def counts(allocation: str, s: float) -> dict[str, int] | None:
    """Weights that each layer is asked for, where it is known beforehand."""
    shares = {"bert.attention": 0.25, "gpt.attn": 0.75, "llama.self_attn": 0.75, "mha": 0.5}
    if allocation == "uniform":
        return {layer: oracle.count(size_of(layer), s) for layer in LAYERS}
    if allocation == "mapping":
        return {layer: oracle.count(size_of(layer), share) for layer, share in shares.items()}
    if allocation == "function":
        return {layer: int(size_of(layer) * s / 2) for layer in LAYERS}
    return None


def whole(found: dict[str, Any], layer: str) -> int:
    """Weights of a layer's units that are wholly zero."""
    sizes = heads.unit_sizes(layer)
    return sum(n for n, unit in zip(sizes, LAYERS[layer], strict=True) if all(found[name][s].all() for name, s in unit))


@pytest.mark.parametrize(("allocation", "criterion"), DEFINED)
def test_every_combination_in_every_dtype(allocation: str, criterion: str) -> None:
    both: list[tuple[Any, float]] = [("plain", 0.5), ("ties", 0.4)]
    often = allocation in ("global", "uniform") and criterion == "magnitude"
    turn = DEFINED.index((allocation, criterion))
    for i, dtype in enumerate(DTYPES):
        if not often and (i + turn) % 5:
            continue
        for kind, s in both if often else [both[(i + turn) // 5 % 2]]:
            model = attentive(dtype, kind)
            pool = pool_of(model)
            report = prune(model, **asked(allocation, criterion, s))
            found, own = zeros(model), CRITERIA[criterion]
            mean = allocation == "global" or own != "magnitude"
            if allocation == "global":
                must = masks(units_gone(own, list(LAYERS), pool, oracle.count(TOTAL, s), "mean"), pool)
            else:
                asked_for = counts(allocation, s) or {layer: whole(found, layer) for layer in LAYERS}
                gone = {}
                for layer, k in asked_for.items():
                    gone |= units_gone(own, [layer], pool, k, "mean" if mean else "l2")
                must = masks(gone, pool)
                if counts(allocation, s) is None and kind == "plain":
                    lost = sum(whole(found, layer) for layer in LAYERS)
                    assert oracle.count(TOTAL, s) - len(LAYERS) * LARGEST < lost <= oracle.count(TOTAL, s)
            for name in CHOSEN:
                assert np.array_equal(found[name], must[name]), (dtype, kind, name)
                assert report[name].zeros == must[name].sum()
            assert report.total == TOTAL and report.zeros == sum(m.sum() for m in must.values())


@pytest.mark.parametrize("reduce", ["mean", "l1", "l2", "max"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_every_way_to_make_scores_one(reduce: Any, allocation: str) -> None:
    for s in (0.2, 0.5, 0.8):
        model = attentive("bfloat16", "ties")
        pool = pool_of(model)
        prune(model, **asked(allocation, s=s) | {"pattern": Head(4, reduce)})
        gone = {}
        for layers in [list(LAYERS)] if allocation == "global" else [[layer] for layer in LAYERS]:
            gone |= units_gone("magnitude", layers, pool, oracle.count(sum(map(size_of, layers)), s), reduce)
        must, found = masks(gone, pool), zeros(model)
        assert all(np.array_equal(found[n], must[n]) for n in CHOSEN)


def test_biases_go_along_and_do_not_count() -> None:
    model = attentive()
    before = tensors(model)
    report = prune(model, **asked("uniform", s=0.5))
    after = tensors(model)
    layer_of = {"bert": "bert.attention", "gpt": "gpt.attn", "llama": "llama.self_attn", "mha": "mha"}
    for name, slices in BIASES.items():
        row = report[next(n for n in CHOSEN if n.startswith(name.split(".")[0]))]
        must = torch.zeros(before[name].shape, dtype=torch.bool)
        for unit in row.units or ():
            for where in slices[unit]:
                must[where] = True
        assert 0 < int(must.sum()) < must.numel()
        assert torch.equal(after[name], before[name].masked_fill(must, 0))
        assert report[name].goes_with in CHOSEN and report[name].skip == "goes with its layer's heads"
        assert len({r.units for r in report.chosen if r.name.startswith(layer_of[name.split(".")[0]])}) == 1
    for name in LEFT:
        assert torch.equal(after[name], before[name])
    assert report.total == TOTAL and [r.name for r in report.chosen] == list(CHOSEN)


ONCE_EACH = [(a, "magnitude") for a in ALLOCATIONS if a != "lamp"] + [
    ("global", c) for c in CRITERIA if c != "magnitude"
]


@pytest.mark.parametrize(("allocation", "criterion"), [p for p in ONCE_EACH if p[0] != "uniform_plus"])
def test_module_dict_wrapper_and_files_agree(allocation: str, criterion: str, tmp_path: Path) -> None:
    how = asked(allocation, criterion)
    model = attentive("mixed", "ties")
    dense = tensors(model)
    seen = prune(model, **how)
    want = snapshot(model)
    facts = [(r.name, r.zeros, r.threshold, r.units) for r in seen.chosen]
    as_dict = {f"module.{n}": t.clone() for n, t in reversed(dense.items())}
    wrapped = AveragedModel(attentive("mixed", "ties"))
    shards = save_shards(dense, tmp_path / "in")
    single = save_one(dense, tmp_path)
    for target, out in (
        (as_dict, None),
        (wrapped, None),
        (shards, tmp_path / "out"),
        (single, tmp_path / "out.safetensors"),
    ):
        report = prune(target, **how) if out is None else prune(target, out=out, **how)
        assert [(r.name, r.zeros, r.threshold, r.units) for r in report.chosen] == facts
    assert {n.removeprefix("module."): bits(t) for n, t in as_dict.items()} == want
    assert snapshot(wrapped.module) == want
    assert snapshot(load(tmp_path / "out")) == want and snapshot(load(tmp_path / "out.safetensors")) == want


@pytest.mark.parametrize(("allocation", "criterion"), ONCE_EACH)
def test_a_plan_can_be_saved_and_carried_out_anywhere(allocation: str, criterion: str, tmp_path: Path) -> None:
    how = asked(allocation, criterion)
    model = attentive("bfloat16", "ties")
    dense = tensors(model)
    with expected_warnings():
        plan = secateur.plan(model, **how)
    assert snapshot(model) == snapshot(dense)
    secateur.save_plan(plan, tmp_path / "plan.json")
    loaded = secateur.load_plan(tmp_path / "plan.json")
    assert loaded == plan and loaded.masks is None
    want = attentive("bfloat16", "ties")
    report = prune(want, **how)
    assert (plan.prune, plan.total) == (report.zeros, report.total)
    with expected_warnings():
        secateur.apply(loaded, model)
        secateur.apply(loaded, save_shards(dense, tmp_path / "in"), out=tmp_path / "out")
    assert snapshot(model) == snapshot(want) == snapshot(load(tmp_path / "out"))


@pytest.mark.parametrize(("allocation", "criterion"), [p for p in ONCE_EACH if p[1] != "function"])
def test_absolute_and_nested(allocation: str, criterion: str) -> None:
    """Not of `centred`, whose scores change with what is zero, so that another unit may fit."""
    stepped, found = attentive("bfloat16", "ties"), []
    for s in (0.2, 0.5, 0.7):
        model = attentive("bfloat16", "ties")
        first = prune(model, **asked(allocation, criterion, s))
        found.append(zeros(model))
        after = snapshot(model)
        assert prune(model, **asked(allocation, criterion, s)).zeros == first.zeros and snapshot(model) == after
        prune(stepped, **asked(allocation, criterion, s))
        assert snapshot(stepped) == after
    for sparser, denser in pairwise(found):
        assert all((sparser[n] <= denser[n]).all() for n in CHOSEN)


def test_caps_hold_every_layer() -> None:
    for allocation in ("global", "uniform", "erk"):
        model = attentive()
        prune(model, **asked(allocation, s=0.4, max_sparsity={"mha": 0.25, "bert": 0.5}, min_keep=30))
        found = zeros(model)
        assert (
            whole(found, "mha") <= size_of("mha") // 4
            and whole(found, "bert.attention") <= size_of("bert.attention") // 2
        )
        assert all(size_of(layer) - whole(found, layer) >= 30 for layer in LAYERS)


@pytest.mark.parametrize("nonfinite", ["keep", "prune"])
def test_values_that_are_not_finite(nonfinite: str) -> None:
    model = attentive(kind="bad")
    with pytest.raises(secateur.BadTensor, match=r"NaN or infinite"):
        secateur.prune(model, 0.4, pattern=PATTERN)
    pool = pool_of(model)
    prune(model, **asked("global", s=0.3, nonfinite=nonfinite))
    must = masks(
        units_gone("magnitude", list(LAYERS), pool, oracle.count(TOTAL, 0.3), "mean", nonfinite), pool, nonfinite
    )
    found = zeros(model)
    assert all(np.array_equal(found[n], must[n]) for n in CHOSEN)


def test_a_layer_is_chosen_whole_or_not_at_all() -> None:
    model = attentive()
    before = snapshot(model)
    with pytest.raises(
        secateur.NotDefined, match=r"a head of 'bert\.attention' .*self\.key\.weight is not chosen: choose all"
    ):
        secateur.prune(model, 0.5, pattern=PATTERN, ignore="*.key")
    with pytest.raises(secateur.NotDefined, match=r"mha\.out_proj\.weight is not chosen"):
        secateur.prune(model, 0.5, pattern=PATTERN, include="mha.in_proj_weight")
    assert snapshot(model) == before
    report = prune(model, sparsity=0.5, pattern=PATTERN, include=["mha"])
    assert [r.name for r in report.chosen] == ["mha.in_proj_weight", "mha.out_proj.weight"]


def test_the_pruner_holds_heads() -> None:
    """Through steps of an optimizer with momentum and decay, weights and biases of pruned heads stay zero."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    pruner = secateur.Pruner(layer, optimizer, secateur.schedules.linear(0.5, begin=0, end=4), pattern="head:4")
    for _ in range(7):
        optimizer.zero_grad()
        layer(torch.randn(3, 5, 8)).square().mean().backward()
        optimizer.step()
    attention = layer.self_attn
    dead = (attention.out_proj.weight == 0).all(0)
    assert int(dead.sum()) == 4 and pruner.sparsity == 0.5
    packed = (attention.in_proj_weight == 0).all(1)
    assert packed.tolist() == dead.tolist() * 3
    assert (attention.in_proj_bias == 0).tolist() == dead.tolist() * 3
    assert not (layer.linear1.weight == 0).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_gpu_gives_the_same_heads(criterion: str) -> None:
    here, there = attentive("bfloat16", "ties"), attentive("bfloat16", "ties").cuda()
    both = [prune(m, **asked("global", criterion)) for m in (here, there)]
    assert [r.units for r in both[0].chosen] == [r.units for r in both[1].chosen]
    assert snapshot({n: t.cpu() for n, t in there.state_dict().items()}) == snapshot(here)
