"""Recipes: what may be said and what is refused, how they run, and how a run is taken up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur
from secateur.core import schedules
from secateur.errors import BadInput
from secateur.recipe.load import check, in_form, parse, read, with_settings
from secateur.recipe.run import Cell, run
from secateur.recipe.training import Trainer, accuracy, log
from secateur.train.engine import Run as Stretch
from tests.guard.source import ROOT
from tests.unit.conftest import Run

HERE = "tests.unit.test_recipe"
pytestmark = pytest.mark.filterwarnings("ignore:.*left with nothing")  # the networks are tiny
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
  rigl: {{sparse: {{every: 2}}, train: {{epochs: 2, regularize: {{kind: l1, strength: 0.001}}}}}}
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


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - nn.functional.one_hot(batch[1], 2)).square().mean()


def own_loop(run: Stretch) -> None:
    run.model.train()
    for _, batch in run.batches():
        run.optimizer.zero_grad()
        squares(run.model, batch).backward()
        run.optimizer.step()
        run.scheduler.step()


class Speaking(nn.Module):
    """Returns its own loss and logits, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.inner(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


class Named(Data):
    def train(self, generator: torch.Generator) -> Any:
        return [{"x": x, "labels": y} for x, y in super().train(generator)]


def named(seed: int, count: int) -> Data:
    found = Named(seed, count)
    found.test = [{"x": found.x[:40], "labels": found.y[:40]}, {"x": found.x[40:], "labels": found.y[40:]}]  # type: ignore[assignment]
    return found


def recipe(folder: Path, *settings: str) -> Any:
    return check(with_settings(parse(TEXT), [f"folder={folder}", *settings]))


def shown(cells: Sequence[Cell]) -> list[tuple[int, str, float, float, int]]:
    return [(c.seed, c.method, c.asked, round(c.sparsity, 4), c.epochs) for c in cells]


def test_every_method_reaches_every_sparsity(tmp_path: Path) -> None:
    cells = run(recipe(tmp_path / "r", "seeds=[3]", "methods.gradual.prune.min_keep=4"))
    assert shown(cells) == [
        (3, "dense", 0.0, 0.0, 2), (3, "one-shot", 0.5, 0.5, 2), (3, "one-shot", 0.75, 0.75, 2),
        (3, "fine-tuned", 0.5, 0.5, 3), (3, "fine-tuned", 0.75, 0.75, 3), (3, "gradual", 0.5, 0.5, 3),
        (3, "gradual", 0.75, 0.75, 3), (3, "iterative", 0.5, 0.5, 4), (3, "iterative", 0.75, 0.75, 6),
        (3, "rigl", 0.5, 0.5, 2), (3, "rigl", 0.75, 0.75, 2),
    ]  # fmt: skip
    assert all(0 <= c.metrics["accuracy"] <= 100 for c in cells)
    assert json.loads((tmp_path / "r" / "results.json").read_text()) == [vars(c) for c in cells]
    (path,) = (tmp_path / "r" / "seed-3").glob("gradual/0.75.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13)) and lines[-1]["asked"] == lines[-1]["found"] == 0.75
    assert cells[-1].layers.keys() == {"0.weight", "2.weight"} and cells[0].layers["0.weight"] == 0.0


def test_the_page_names_layers_that_were_left_with_nothing(tmp_path: Path) -> None:
    only = "methods={gradual: {prune: {schedule: gradual}, finetune: {epochs: 1}}}"
    cells = run(recipe(tmp_path / "r", "seeds=[3]", "sparsities=[0.9]", only))
    assert cells[-1].layers["2.weight"] == 1.0
    assert "gradual at 0.9 left nothing of 2.weight" in (tmp_path / "r" / "report.html").read_text()


NOT_COMPARED = ("lock", "run.json", "report.html")  # the settings and the page name the folder
SECONDS = ("taken.json", "costs.json")  # which are never the same twice


def files(folder: Path) -> dict[str, bytes]:
    kept = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".pt" and p.name not in NOT_COMPARED)
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if not p.name.endswith(SECONDS)}


@pytest.mark.parametrize("after", [1, 5, 23, 41])
def test_a_run_is_taken_up_with_the_same_bytes(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = "seeds=[0]", f"model='{HERE}:dropping'", "train.optimizer.args.momentum=0.9"
    whole = run(recipe(tmp_path / "whole", *settings))
    seen = [0]

    def break_off(what: str, done: int, total: int) -> None:
        seen[0] += 1
        if seen[0] % after == 0:
            raise KeyboardInterrupt

    for _ in range(1000 if after > 4 else 1):
        try:
            assert run(recipe(tmp_path / "cut", *settings), break_off) == whole
            break
        except KeyboardInterrupt:
            seen[0] += 1  # so that every turn gets further than the one before
    assert run(recipe(tmp_path / "cut", *settings)) == whole
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    monkeypatch.setattr(Trainer, "fit", lambda *a: pytest.fail("trains again"))
    assert run(recipe(tmp_path / "cut", *settings)) == whole


def test_a_cell_is_the_same_whether_or_not_its_dense_network_was_trained_just_before(tmp_path: Path) -> None:
    way = "{prune: {}, finetune: {epochs: 1}, train: {epochs: 1}}"
    asked = recipe(tmp_path / "r", "seeds=[0]", f"model='{HERE}:dropping'", f"methods={{own: {way}}}")
    whole = run(asked)
    before = files(tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "seed-0" / "own" / "0.5")
    assert run(asked) == whole and files(tmp_path / "r") == before


def test_a_log_is_cut_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with log(path, 2) as lines:
        lines.write('{"step": 3, "again": true}\n')
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n', "what was kept is in the file at any moment"
    assert path.read_text().splitlines()[2:] == ['{"step": 3, "again": true}']
    with log(path, 0):
        assert path.read_text() == ""


@pytest.mark.parametrize(("change", "text"), [
    (lambda t: t + "nmae: 3\n", "nmae: there is no such setting; did you mean 'name'?"),
    (lambda t: t.replace("allocation:", "alocation:"), "methods.fine-tuned.prune.alocation: .*did you mean 'allocation'"),
    (lambda t: t + "name: again\n", r"line \d+: 'name' is there twice"),
    (lambda t: t.replace("epochs: 2", "epochs: '2'"), r"train.epochs: .*integer.*; got '2'"),
    (lambda t: t.replace("epochs: 2", "epochs: 0"), "train.epochs: .*greater than or equal to 1"),
    (lambda t: t.replace("[0.5, 0.75]", "[50, 75]"), r"Did you mean 0\.5"),
    (lambda t: t.replace("[0.5, 0.75]", "[0.75, 0.5]"), "sparsities rise"),
    (lambda t: t.replace("prune: {min_keep: 4}", "prune: {}, iterate: {epochs: 1}"), "prune, iterate, sparse or dense, one of"),
    (lambda t: t.replace("tests.unit.test_recipe:network", "not a function"), "model"),
    (lambda t: t.replace("gradual:", "../up:"), "a method is named with letters"),
    (lambda t: t.replace("gradual:", "dense:"), "not 'dense'"),
    (lambda t: t.replace("{schedule: gradual}", "{schedule: {begin: 2, end: 1, every: 1}}"), "must end after it begins"),
    (lambda t: t.replace("schedule: gradual", "start: dense"), "over the epochs of finetune; say both"),
    (lambda t: t.replace("rounds: 2,", "controls: [random],") + "  iterative, random: {prune: {}}\n", "the name of a control"),
    (lambda t: t + "export: {method: gradual, sparsity: 0.6}\n", "a sparsity of this recipe"),
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
    monkeypatch.setattr(Trainer, "fit", lambda *a: pytest.fail("trains"))
    for setting, text in (
        ("prune.ignore=nothing", "matches nothing"),
        ("prune.pattern='3:1'", "keep=3, of=1"),
        ("prune.allocation=all", "'all'"),
        ("prune.schedule={begin: 0, end: 9, every: 1}", "the schedule ends at step 36, and the training has 12 steps"),
    ):
        with pytest.raises(BadInput, match=text):
            run(recipe(tmp_path / setting[6:10], f"methods.gradual.{setting}"))


def test_sparsity_is_that_of_the_chosen_weights(tmp_path: Path) -> None:
    cells = run(
        recipe(tmp_path / "r", "seeds=[0]", "methods.one-shot.prune.ignore='2'", "methods.gradual.prune.ignore='2'")
    )
    found = {(c.method, c.asked): c.sparsity for c in cells}
    assert found["one-shot", 0.75] == found["gradual", 0.75] == 0.75


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "weights.safetensors")


def test_a_loss_and_a_loop_of_the_users_own_give_the_same(tmp_path: Path) -> None:
    for how in ("loss='squares'", "loop='own_loop'"):
        name, call = how.split("=")
        run(recipe(tmp_path / name, "seeds=[0]", f"train.{name}='{HERE}:{call[1:-1]}'"))
    assert weights(tmp_path / "loss/seed-0/gradual/0.5").keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for cell in ("dense/0", "gradual/0.75", "iterative/round-02"):
        a, b = weights(tmp_path / "loss/seed-0" / cell), weights(tmp_path / "loop/seed-0" / cell)
        assert all(torch.equal(a[n], b[n]) for n in a)
    line = json.loads((tmp_path / "loop/seed-0/gradual/0.75.jsonl").read_text().splitlines()[-1])
    assert line == {"step": 12, "loss": None, "asked": 0.75, "found": 0.75}


def test_batches_may_be_the_arguments_of_a_model_that_returns_its_loss(tmp_path: Path) -> None:
    settings = "seeds=[0]", f"data.call='{HERE}:named'", f"model='{HERE}:Speaking'"
    cells = run(recipe(tmp_path / "r", *settings))
    assert shown(cells) == shown(run(recipe(tmp_path / "s", "seeds=[0]")))
    speaking = Speaking()
    assert accuracy(speaking, named(0, 64)) == accuracy(speaking.inner, Data(0, 64))


def test_controls_are_methods_of_their_own(tmp_path: Path) -> None:
    asked = "methods={ticket: {iterate: {epochs: 1, rounds: 1, controls: [reinit, random]}}}"
    cells = run(recipe(tmp_path / "r", "seeds=[0]", asked))
    assert shown(cells)[1:] == [
        (0, "ticket", 0.5, 0.5, 4), (0, "ticket", 0.75, 0.75, 6), (0, "ticket, reinit", 0.5, 0.5, 2),
        (0, "ticket, reinit", 0.75, 0.75, 2), (0, "ticket, random", 0.5, 0.5, 2), (0, "ticket, random", 0.75, 0.75, 2),
    ]  # fmt: skip
    assert (tmp_path / "r/seed-0/ticket/round 2, reinit.jsonl").exists()
    page = (tmp_path / "r/report.html").read_text()
    assert "ticket, random: training loss" in page and "https://" not in page


@pytest.mark.parametrize(("method", "moves"), [("static", False), ("set", True), ("rigl", True)])
def test_sparse_from_the_start(tmp_path: Path, method: str, moves: bool) -> None:
    cells = run(recipe(tmp_path / "r", "seeds=[0]", f"methods={{sparse: {{sparse: {{method: {method}, every: 2}}}}}}"))
    torch.manual_seed(0)
    random = secateur.random(0)
    start = secateur.Pruner(network(), None, schedules.constant(0.75), criterion=random, allocation="erk").masks()
    live = {n: t != 0 for n, t in weights(tmp_path / "r/seed-0/sparse/0.75").items() if n in start}
    assert all(torch.equal(live[n], start[n]) for n in start) != moves
    lines = (tmp_path / "r/seed-0/sparse/0.75.jsonl").read_text().splitlines()
    assert [json.loads(line)["found"] for line in lines] == [0.75] * 8
    assert cells[-1].sparsity >= 0.75, "what grew at zero and got no gradient is zero too"


def test_gradual_pruning_from_the_dense_network_by_a_schedule_in_epochs(tmp_path: Path) -> None:
    way = "{prune: {start: dense, schedule: {kind: linear, begin: 0, end: 2, every: 0.5}}, finetune: {epochs: 3, warm_up: 0.5}}"
    cells = run(recipe(tmp_path / "r", "seeds=[0]", f"methods={{gradual: {way}}}"))
    assert shown(cells)[1:] == [(0, "gradual", 0.5, 0.5, 5), (0, "gradual", 0.75, 0.75, 5)]
    lines = (tmp_path / "r/seed-0/gradual/0.75.jsonl").read_text().splitlines()
    asked = [json.loads(line)["asked"] for line in lines]
    assert asked == [0.0, 0.1875, 0.1875, 0.375, 0.375, 0.5625, 0.5625, 0.75, 0.75, 0.75, 0.75, 0.75]


def test_one_method_may_stand_at_the_top_and_be_exported(tmp_path: Path) -> None:
    raw = parse(TEXT)
    del raw["methods"]
    raw |= {"folder": str(tmp_path / "r"), "prune": {}, "finetune": {"epochs": 1}, "seeds": [0]}
    raw["export"] = {"method": "pruned", "sparsity": 0.75}
    run(check(raw))
    out, cell = weights(tmp_path / "r/export"), weights(tmp_path / "r/seed-0/pruned/0.75")
    assert out.keys() == cell.keys() and all(torch.equal(out[n], cell[n]) for n in out)
    run(check(raw))


def test_forms_take_the_place_of_settings_and_have_a_folder_of_their_own() -> None:
    raw = parse(TEXT + "quick: {train.epochs: 1, seeds: [7]}\nfull: {folder: elsewhere}\n")
    quick = check(in_form(dict(raw), "quick"))
    assert quick.train.epochs == 1 and quick.seeds == [7] and quick.folder == "runs/tiny-quick"
    assert check(in_form(dict(raw), "full")).folder == "elsewhere"
    with pytest.raises(BadInput, match="no 'quick' form"):
        in_form(parse(TEXT), "quick")


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
    assert done.code == 0 and "iterative" in done.out and "report.html" in done.out
    assert command(*asked).code == 4
    done = command(*asked, "--resume", "--json")
    assert done.code == 0 and len(done.facts) == 11
    assert command(*asked, "--resume", "--set", "train.epochs=3").code == 3
    wrong = command(*asked, "--set", "train.epohcs=3")
    assert wrong.code == 3 and "\n  train.epohcs: there is no such setting; did you mean 'epochs'?" in wrong.err
