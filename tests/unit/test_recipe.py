"""Recipes: what may be said and what is refused, how they run, and how a run is taken up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import BadInput
from secateur.recipe import run as runner
from secateur.recipe.load import check, parse, read, with_settings
from secateur.recipe.run import Cell, run
from tests.guard.source import ROOT
from tests.unit.conftest import Run

HERE = "tests.unit.test_recipe"
TEXT = f"""
name: tiny
folder: runs/tiny
seeds: [0, 1]
data: {{call: "{HERE}:data", args: {{count: 64}}}}
model: "{HERE}:network"
train: {{epochs: 2, optimizer: {{call: "torch.optim:SGD", args: {{lr: 1e-1}}}}, learning_rate: cosine}}
sparsities: [0.5, 0.75]
methods:
  one-shot: {{prune: {{min_keep: 4}}}}
  fine-tuned: {{prune: {{allocation: uniform}}, finetune: {{epochs: 1}}}}
  gradual: {{prune: {{schedule: gradual}}, finetune: {{epochs: 1}}}}
  iterative: {{iterate: {{rewind: lr, rounds: 2, epochs: 1}}}}
"""


class Data:
    def __init__(self, seed: int, count: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 8, generator=g)
        self.y = (self.x[:, 0] > 0).long()
        self.test = self.x, self.y

    def train(self, generator: torch.Generator) -> Sequence[tuple[Tensor, Tensor]]:
        return [(self.x[i], self.y[i]) for i in torch.randperm(len(self.y), generator=generator).split(16)]


def data(seed: int, count: int) -> Data:
    return Data(seed, count)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def recipe(folder: Path, *settings: str) -> Any:
    return check(with_settings(parse(TEXT), [f"folder={folder}", *settings]))


def shown(cells: Sequence[Cell]) -> list[tuple[int, str, float, float, int]]:
    return [(c.seed, c.method, c.asked, round(c.sparsity, 4), c.epochs) for c in cells]


def test_every_method_reaches_every_sparsity(tmp_path: Path) -> None:
    cells = run(recipe(tmp_path / "r", "seeds=[3]"))
    assert shown(cells) == [
        (3, "dense", 0.0, 0.0, 2), (3, "one-shot", 0.5, 0.5, 2), (3, "one-shot", 0.75, 0.75, 2),
        (3, "fine-tuned", 0.5, 0.5, 3), (3, "fine-tuned", 0.75, 0.75, 3), (3, "gradual", 0.5, 0.5, 3),
        (3, "gradual", 0.75, 0.75, 3), (3, "iterative", 0.5, 0.5, 4), (3, "iterative", 0.75, 0.75, 6),
    ]  # fmt: skip
    assert all(0 <= c.metrics["accuracy"] <= 100 for c in cells)
    assert json.loads((tmp_path / "r" / "results.json").read_text()) == [vars(c) for c in cells]
    (log,) = (tmp_path / "r" / "seed-3").glob("gradual/0.75.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13)) and lines[-1]["sparsity"] == 0.75


def test_a_run_is_taken_up_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(recipe(tmp_path / "whole"))
    seen = [0]

    def break_off(what: str, done: int, total: int) -> None:
        seen[0] += 1
        if seen[0] == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe(tmp_path / "cut"), break_off)
    assert run(recipe(tmp_path / "cut")) == whole
    monkeypatch.setattr(runner._Seed, "_train", lambda *a: pytest.fail("trains again"))
    assert run(recipe(tmp_path / "cut")) == whole


@pytest.mark.parametrize(("change", "text"), [
    (lambda t: t + "nmae: 3\n", "nmae: there is no such setting; did you mean 'name'?"),
    (lambda t: t.replace("allocation:", "alocation:"), "methods.fine-tuned.prune.alocation: .*did you mean 'allocation'"),
    (lambda t: t + "name: again\n", r"line \d+: 'name' is there twice"),
    (lambda t: t.replace("epochs: 2", "epochs: '2'"), r"train.epochs: .*integer.*; got '2'"),
    (lambda t: t.replace("epochs: 2", "epochs: 0"), "train.epochs: .*greater than or equal to 1"),
    (lambda t: t.replace("[0.5, 0.75]", "[50, 75]"), r"Did you mean 0\.5"),
    (lambda t: t.replace("[0.5, 0.75]", "[0.75, 0.5]"), "sparsities rise"),
    (lambda t: t.replace("prune: {min_keep: 4}", "prune: {}, iterate: {epochs: 1}"), "prune or iterate, one of the two"),
    (lambda t: t.replace("tests.unit.test_recipe:network", "not a function"), "model"),
    (lambda t: t.replace("gradual:", "../up:"), "a method is named with letters"),
    (lambda t: t.replace("gradual:", "dense:"), "not 'dense'"),
    (lambda t: t + "extra: &a [1]\nmore: *a\n", "aliases"),
    (lambda t: "- a list\n", "should be a mapping"),
    (lambda t: "a: [1\n", "is not YAML"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(change: Callable[[str], str], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        check(parse(change(TEXT)))


def test_settings_from_the_command_line() -> None:
    found = check(with_settings(parse(TEXT), ["train.epochs=7", "methods.one-shot.prune.pattern='2:4'", "seeds=[5]"]))
    assert found.train.epochs == 7 and found.methods["one-shot"].prune.pattern == "2:4" and found.seeds == [5]
    for wrong, text in (
        ("train.epochs", "key=value"),
        ("name.x=1", "no settings of its own"),
        ("a.b=1", "a: there is no such"),
    ):
        with pytest.raises(BadInput, match=text):
            check(with_settings(parse(TEXT), [wrong]))


def test_numbers_without_a_dot_are_numbers() -> None:
    assert parse("a: 1e-4\nb: -2E+3\nc: 1e\nd: 1.5")["a"] == 1e-4
    assert parse("b: -2E+3")["b"] == -2000.0 and parse("c: 1e")["c"] == "1e"


def test_what_pruning_refuses_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner._Seed, "_train", lambda *a: pytest.fail("trains"))
    for setting, text in (
        ("prune.ignore=nothing", "matches nothing"),
        ("prune.pattern='3:1'", "keep=3, of=1"),
        ("prune.allocation=all", "'all'"),
    ):
        with pytest.raises(BadInput, match=text):
            run(recipe(tmp_path / setting[6:9], f"methods.gradual.{setting}"))


def test_sparsity_is_that_of_the_chosen_weights(tmp_path: Path) -> None:
    cells = run(
        recipe(tmp_path / "r", "seeds=[0]", "methods.one-shot.prune.ignore='2'", "methods.gradual.prune.ignore='2'")
    )
    found = {(c.method, c.asked): c.sparsity for c in cells}
    assert found["one-shot", 0.75] == found["gradual", 0.75] == 0.75


def test_functions_that_are_not_there(tmp_path: Path) -> None:
    for call in ("nowhere.at.all:f", f"{HERE}:nothing"):
        with pytest.raises(BadInput, match="cannot be found"):
            run(recipe(tmp_path / "x", f"model='{call}'"))


def test_a_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read the recipe"):
        read(tmp_path / "none.yaml")
    (tmp_path / "big.yaml").write_text("#" * (1 << 21))
    with pytest.raises(BadInput, match="has 1048576 at most"):
        read(tmp_path / "big.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_examples_are_recipes(path: Path) -> None:
    assert read(path).methods


def test_the_command(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "r.yaml").write_text(TEXT)
    asked = ("run", tmp_path / "r.yaml", "--set", f"folder={tmp_path / 'out'}", "--set", "seeds=[0]")
    done = command(*asked, "--dry-run")
    assert done.code == 0 and json.loads(done.out)["name"] == "tiny" and not (tmp_path / "out").exists()
    done = command(*asked)
    assert done.code == 0 and "iterative" in done.out and "Written to" in done.out
    assert command(*asked).code == 4
    done = command(*asked, "--resume", "--json")
    assert done.code == 0 and len(done.facts) == 9
    assert command(*asked, "--resume", "--set", "train.epochs=3").code == 3
