"""SparseML's recipes: what becomes of their training, and how the command writes the new ones."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from secateur.recipe.load import parse
from secateur.recipe.sparseml import imported
from tests.unit.conftest import Run
from tests.unit.old_recipes import asked, gm, lr, modifier, old

# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("rates", "rate", "kind", "said"),
    [
        ([lr("linear")], 0.1, "linear", ""),
        ([lr("cosine", last=0.01)], 0.1, "cosine", "the learning rate ended at 0.01; here it ends at 0"),
        ([lr("cosine", end=6)], 0.1, "cosine", "it went from epoch 0 to 6; here from 0 to 10"),
        ([lr("cyclic_linear")], 0.1, "linear", "cyclic_linear has no counterpart"),
        ([lr("linear", end=2, first=0, last=0.2), lr("cosine", 2, first=0.2)], 0.2, "cosine",
         "the learning rate (linear, 0 to 0.2, in epochs 0 to 2) is left out"),
        ([lr(first=0.01, last=0.1)], 0.1, "constant", "a learning rate that rises"),
        ([lr(param_groups=[0])], 0.1, "linear", "param_groups [0] is left out"),
        ([modifier("LearningRateModifier", start_epoch=0, lr_class="MultiStepLR", init_lr=0.3,
                   lr_kwargs="{milestones: [3, 6], gamma: 0.1}")], 0.3, "linear",
         "MultiStepLR ({'milestones': [3, 6], 'gamma': 0.1}) has no counterpart"),
        ([modifier("SetLearningRateModifier", start_epoch=0, learning_rate=0.5), lr("cosine", 1)], 0.1, "cosine",
         "the learning rate (constant, 0.5, in epochs 0 to 1) is left out"),
    ],
)  # fmt: skip
def test_learning_rates(rates: list[str], rate: float, kind: str, said: str) -> None:
    recipe, notes = asked(gm(), *rates)
    assert recipe["train"]["optimizer"]["args"] == {"lr": rate}
    assert recipe["train"]["learning_rate"] == kind
    assert said in notes


def test_no_learning_rate() -> None:
    recipe, notes = asked(gm(), modifier("SetLearningRateModifier", start_epoch=0, learning_rate="null"))
    assert recipe["train"]["optimizer"]["args"] == {}
    assert "Fill in train.optimizer.args.lr" in notes


def test_weight_decay() -> None:
    decay = [modifier("SetWeightDecayModifier", start_epoch=s, weight_decay=v) for s, v in ((0.0, "5e-4"), (8.0, 0))]
    recipe, notes = asked(gm(), *decay)
    assert recipe["train"]["optimizer"]["args"] == {"weight_decay": 5e-4}
    assert "a weight decay of 0 from epoch 8 on is left out" in notes


def test_the_length_of_training() -> None:
    recipe, notes = asked(gm(end_epoch=12.5))
    assert recipe["train"]["epochs"] == 13
    assert "EpochRangeModifier ends at 10 and another modifier at 12.5: SparseML trains to the later" in notes
    assert "train.epochs is whole, 13" in notes
    recipe, more = imported(f"modifiers: [{gm()}]", "old.yaml")
    assert recipe["train"]["epochs"] == 8
    assert any("No EpochRangeModifier" in n for n in more)


# ------------------------------------------------------------------------------------------ the command


def test_the_command_prints(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "old.md"
    path.write_text(f"# A card\n---\n{old(gm(), modifier('QuantizationModifier', start_epoch=8))}---\n\nText.\n")
    done = command("import-recipe", path)
    assert done.code == 0
    recipe, notes = imported(path.read_text(), path.name)
    assert parse(done.out) == recipe
    assert done.err.splitlines() == notes
    head = done.out.splitlines()
    assert "the SparseML recipe old.md" in head[0]
    assert str(tmp_path) not in done.out
    keys = [line.partition(":")[0] for line in head if line[:1].isalpha()]
    assert keys == ["version", "name", "folder", "data", "model", "train", "sparsities", "methods"]
    assert [head[head.index(f"{k}: my_package.module:{k}") - 1][:10] for k in ("data", "model")] == ["# fill in:"] * 2


def test_the_command_writes(command: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "old.yaml", tmp_path / "new.yaml"
    path.write_text(old(gm()))
    done = command("import-recipe", path, "-o", out)
    assert (done.code, done.out) == (0, "")
    first = out.read_text()
    assert parse(first)["sparsities"] == [0.8]
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(path.stat().st_mode)
    path.write_text(old(gm(final_sparsity=0.5)))
    refused = command("import-recipe", path, "-o", out)
    assert (refused.code, out.read_text()) == (4, first)
    assert command("import-recipe", path, "-o", out, "--overwrite").code == 0
    assert parse(out.read_text())["sparsities"] == [0.5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.yaml", "old.yaml"]


@pytest.mark.parametrize("text", ["- a\n", "modifiers: [!GMPruningModifier {}]\n", "x: *y\n", "modifiers: []\n"])
def test_the_command_refuses(command: Run, tmp_path: Path, text: str) -> None:
    path, out = tmp_path / "old.yaml", tmp_path / "new.yaml"
    path.write_text(text)
    done = command("import-recipe", path, "-o", out)
    assert done.code == 3
    assert "error: old.yaml" in done.err.replace("\n", " ")
    assert not out.exists()
    assert command("import-recipe", tmp_path / "none.yaml").code == 3


def test_what_is_printed_is_printable(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "a\nb: c.yaml"
    path.write_text(old(gm(params='["re:(?=\\e[31m)"]')))
    done = command("import-recipe", path)
    assert done.code == 0
    assert "\x1b" not in done.err
    assert parse(done.out)["name"] == "a-b-c"
