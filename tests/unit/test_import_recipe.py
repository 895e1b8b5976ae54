"""SparseML's recipes: what becomes of each pruning modifier, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.core.spelling import pattern_of
from secateur.recipe.load import check
from secateur.recipe.run import run
from tests.unit.old_recipes import SCHEDULE, asked, built, gm, lr, modifier, prune_of, schedule_of

# ------------------------------------------------------------------------------------------ gradual pruning


def test_gradual_magnitude_pruning() -> None:
    recipe, notes = asked(gm(), modifier("SetLearningRateModifier", start_epoch=0, learning_rate=0.1))
    assert recipe == {
        "version": 1, "name": "old", "folder": "runs/old", "data": "my_package.module:data",
        "model": "my_package.module:model",
        "train": {"epochs": 10, "optimizer": {"call": "torch.optim:SGD", "args": {"lr": 0.1}}, "learning_rate": "constant"},
        "sparsities": [0.8],
        "methods": {"gradual": {"prune": {
            "criterion": "magnitude", "allocation": "uniform", "pattern": "unstructured", "include": ["conv.weight"],
            "min_keep": 0, "schedule": SCHEDULE}}},
    }  # fmt: skip
    assert notes.count("\n") == 2, "beyond what is to be filled in, nothing is lost"
    for said in ("Fill in data and model", "Fill in train.optimizer", "load the trained network"):
        assert said in notes
    s = built(recipe)
    assert [s(99), s(100), s(800)] == [0.0, pytest.approx(0.05), 0.8]


@pytest.mark.parametrize("kind", ["MagnitudePruningModifier", "LegacyGMPruningModifier", "pytorch.GMPruningModifier"])
def test_other_names_of_the_same(kind: str) -> None:
    assert prune_of(asked(gm(kind))[0]) == prune_of(asked(gm())[0])


@pytest.mark.parametrize(
    ("text", "allocation"),
    [
        (gm("GlobalMagnitudePruningModifier"), "global"),
        (gm(global_sparsity=True), "global"),
        (gm(global_sparsity=False), "uniform"),
    ],
)
def test_one_pool_or_one_share(text: str, allocation: str) -> None:
    assert prune_of(asked(text)[0])["allocation"] == allocation


@pytest.mark.parametrize(
    ("curve", "kind", "power"), [("linear", "linear", 1), ("cubic", "cubic", 3), ("inverse_cubic", "polynomial", 1 / 3)]
)
def test_curves(curve: str, kind: str, power: float) -> None:
    recipe, _ = asked(gm(inter_func=curve, start_epoch=0, init_sparsity=0))
    assert schedule_of(recipe)["kind"] == kind
    assert schedule_of(recipe).get("power", power) == power
    assert built(recipe)(400) == pytest.approx(0.8 * (1 - 0.5**power))  # SparseML: 1 - (1 - p) ** power


def test_an_unknown_curve_is_cubic_and_said() -> None:
    recipe, notes = asked(gm(inter_func="bounce"))
    assert schedule_of(recipe)["kind"] == "cubic"
    assert "the curve bounce has no counterpart; the schedule is cubic" in notes


def test_the_sparsity_there_is() -> None:
    recipe, notes = asked(gm(init_sparsity="__FROM_PARAM__"))
    assert schedule_of(recipe)["initial"] == 0.0
    assert "__FROM_PARAM__ became 0" in notes


def test_updates_before_every_batch() -> None:
    recipe, notes = asked(gm(update_frequency=-1.0))
    assert schedule_of(recipe)["every"] == 0.07
    assert "no update_frequency means every batch" in notes


def test_a_start_before_training() -> None:
    recipe, notes = asked(gm(start_epoch=-1.0, end_epoch=9, init_sparsity=0, inter_func="linear"))
    assert schedule_of(recipe)["begin"] == 0.0
    assert "counts from start_epoch -1 and is at 0.08 when training begins" in notes


def test_an_end_that_never_comes() -> None:
    with pytest.raises(ValueError, match=r"stays at init_sparsity 0\.05 for ever"):
        asked(gm(end_epoch=-1.0))
    recipe, notes = asked(gm(end_epoch=-1.0, init_sparsity=0.8))
    assert schedule_of(recipe)["end"] == 10.0
    assert "became the end of training" in notes
    assert built(recipe)(100) == 0.8


def test_an_end_that_is_the_end_of_training() -> None:
    """SparseML updates before steps only: with an end at epoch 10 the last update is at 9."""
    _, notes = asked(gm(start_epoch=0, end_epoch=10, update_frequency=3.0, init_sparsity=0, inter_func="linear"))
    assert "last update before that, at epoch 9, left a sparsity of 0.7200; secateur prunes to 0.8 after" in notes
    assert "last update" not in asked(gm(end_epoch=9.5))[1]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"score_type": "movement"}, "it scores weights by movement"),
        ({"score_type": "MFAC"}, "it scores weights by MFAC"),
        ({"phased": True}, "phased: true is AC/DC"),
        ({"init_sparsity": 0.9}, "init_sparsity 0.9 is above final_sparsity 0.8"),
        ({"end_epoch": 1.0}, "SparseML divides by zero"),
        ({"mask_type": "bank"}, "no pattern for mask_type bank"),
        ({"mask_type": [4, -1]}, "no pattern for blocks"),
        ({"mask_type": '"4:2"'}, "no pattern for mask_type 4:2"),
        ({"mask_type": "2:4"}, "no pattern for mask_type 124 (in YAML an N:M without quotes is a number)"),
    ],
)
def test_what_is_not_carried_over(settings: dict[str, Any], why: str) -> None:
    """Alone it leaves nothing to write; beside another it is a note."""
    with pytest.raises(ValueError, match="nothing in it prunes by magnitude") as refused:
        asked(gm(**settings))
    assert why in str(refused.value)
    recipe, notes = asked(gm(**settings), gm(final_sparsity=0.5))
    assert recipe["sparsities"] == [0.5]
    assert "GMPruningModifier was not carried over: " in notes
    assert why in notes


@pytest.mark.parametrize(
    ("settings", "pattern", "said"),
    [
        ({"mask_type": "unstructured"}, "unstructured", ""),
        ({"mask_type": "block4"}, "1x4", "where SparseML padded"),
        ({"mask_type": [1, 4]}, "1x4", "by the mean of |w|"),
        ({"mask_type": [4, 4]}, "4x4", "1x16 is what SparseML pruned"),
        ({"mask_type": "filter"}, "channel", "takes its bias along"),
        ({"mask_type": "channel"}, "channel:in", ""),
    ],
)
def test_patterns(settings: dict[str, Any], pattern: str, said: str) -> None:
    recipe, notes = asked(gm(**settings))
    assert prune_of(recipe)["pattern"] == pattern
    assert str(pattern_of(pattern)) == pattern
    assert said in notes


@pytest.mark.parametrize("mask", ['"2:4"', "tensorrt"])
def test_groups(mask: str) -> None:
    recipe, notes = asked(gm(mask_type=mask, init_sparsity=0.5, final_sparsity=0.5))
    assert (prune_of(recipe)["pattern"], prune_of(recipe)["allocation"], recipe["sparsities"]) == (
        "2:4",
        "global",
        [0.5],
    )
    assert "whatever final_sparsity says" not in notes
    assert "2:4 is a sparsity of 0.5, whatever final_sparsity says" in asked(gm(mask_type=mask, final_sparsity=0.8))[1]


def test_structured_pruning() -> None:
    recipe, notes = asked(gm("StructuredPruningModifier", params=None, param_groups="[[a.weight, b.weight]]"))
    assert prune_of(recipe)["pattern"] == "channel"
    assert "include" not in prune_of(recipe)
    assert "param_groups is not carried over" in notes


def test_masks_that_end() -> None:
    assert "let weights grow back" in asked(gm(leave_enabled=False))[1]
    assert "let weights grow back" not in asked(gm(leave_enabled=True))[1]


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("params", "include", "said"),
    [
        ("__ALL_PRUNABLE__", None, "became secateur's own choice"),
        ("__ALL__", None, "biases and norms too"),
        ("[fc.weight, head.weight]", ["fc.weight", "head.weight"], ""),
        ("['re:.*weight']", ["*weight"], ""),
        ("['re:block.*.conv', fc.weight]", ["block*.conv*", "fc.weight"], ""),
        (r"['re:layer\.\d+\.weight']", ["layer.[0-9]*.weight"], "which may match more"),
        ("['re:(?!stem).*', 're:fc']", ["re:(?!stem).*", "fc*"], "matches nothing, so fill in globs"),
    ],
)
def test_params(params: str, include: list[str] | None, said: str) -> None:
    recipe, notes = asked(gm(params=params))
    assert prune_of(recipe).get("include") == include
    assert said in notes


# ------------------------------------------------------------------------------------------ several modifiers


def test_alike_modifiers_are_one() -> None:
    recipe, _ = asked(gm(params="[a.weight]"), gm(params="[b.weight, a.weight]"))
    assert prune_of(recipe)["include"] == ["a.weight", "b.weight"]
    notes = asked(gm("GlobalMagnitudePruningModifier"), gm("GlobalMagnitudePruningModifier", params="[b.weight]"))[1]
    assert "a pool of its own" in notes


def test_final_sparsities_of_their_own() -> None:
    several, notes = asked(gm(params="[a.weight]"), gm(params="['re:b.*weight']", final_sparsity=0.9))
    mapped, _ = asked(gm(params="[]", final_sparsity="{0.8: [a.weight], 0.9: ['re:b.*weight']}"))
    assert several == mapped
    prune = prune_of(several, "one-shot")
    assert prune["allocation"] == {"a.weight": 0.8, "b*weight": 0.9}
    assert prune["include"] == ["a.weight", "b*weight"]
    assert (several["sparsities"], prune["schedule"]) == ([0.9], "one-shot")
    assert several["methods"]["one-shot"]["finetune"] == {"epochs": 9, "learning_rate": "constant"}
    assert "0.05 to 0.8, cubic, epochs 1 to 8, every 0.5; 0.05 to 0.9" in notes
    assert check(several).methods["one-shot"].finetune is not None


def test_it_runs_as_soon_as_it_is_filled_in(tmp_path: Path) -> None:
    one, two = gm(params="['re:0.weight']", final_sparsity=0.5), gm(params="[2.weight]", final_sparsity=0.75)
    recipe, _ = asked(one, two, lr())
    here = "tests.unit.test_recipe"
    recipe |= {"data": {"call": f"{here}:data", "args": {"count": 64}}, "model": f"{here}:network"}
    cells = run(check({**recipe, "folder": str(tmp_path / "run")}))
    assert [c.method for c in cells] == ["dense", "one-shot"]
    assert cells[1].sparsity == (64 + 24) / (16 * 8 + 2 * 16)


def test_others_are_said() -> None:
    recipe, notes = asked(gm(), gm(final_sparsity=0.9, mask_type="block4"))
    assert (recipe["sparsities"], prune_of(recipe)["pattern"]) == ([0.9], "1x4")
    assert "since a method has one pattern" in notes
    assert "0.05 to 0.8, cubic" in notes


def test_the_same_tensors_twice() -> None:
    recipe, notes = asked(gm(), gm(init_sparsity=0.8, final_sparsity=0.9, start_epoch=8, end_epoch=9))
    assert schedule_of(recipe)["begin"] == 8.0
    assert "was not carried over beside the one to 0.9" in notes


def test_constant_pruning() -> None:
    constant = modifier("ConstantPruningModifier", start_epoch=0, params="__ALL_PRUNABLE__")
    assert "secateur does so by itself, once it has pruned" in asked(gm(), constant)[1]
    with pytest.raises(ValueError, match=r"secateur.Pruner\(model, optimizer\) is enough"):
        asked(constant)


def test_ac_dc() -> None:
    phases = modifier(
        "ACDCPruningModifier",
        compression_sparsity=0.9,
        start_epoch=2,
        end_epoch=10,
        update_frequency=2,
        params="__ALL__",
    )
    notes = asked(gm(), phases)[1]
    assert "schedules.ac_dc(0.9, begin=, end=, sparse=, dense=)" in notes
    assert (
        "the first sparse phase begins at epoch 4 (SparseML's first phase is dense), each phase has 2 epochs" in notes
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("QuantizationModifier", "secateur does not quantise"),
        ("DistillationModifier", "your own loop around secateur.Pruner"),
        ("MovementPruningModifier", "by gradients or second derivatives"),
        ("MFACPruningModifier", "by gradients or second derivatives"),
        ("OBSPruningModifier", "by gradients or second derivatives"),
        ("TrainableParamsModifier", "do it in the function that model names"),
        ("MadeUpModifier", "it is not known here"),
    ],
)
def test_the_rest_is_said_once(kind: str, said: str) -> None:
    notes = asked(gm(), modifier(kind, start_epoch=1), modifier(kind, start_epoch=2))[1]
    assert notes.count(f"{kind} was not carried over: ") == 1
    assert said in notes
