"""Recipes as comparisons: what cells record, who computes them, and what ``secateur compare`` makes of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.engines.spread import Engine
from secateur.errors import BadInput
from secateur.evaluate.compare import compare
from secateur.recipe.comparing import compared
from secateur.recipe.load import check, parse, with_settings
from secateur.recipe.run import run
from secateur.recipe.training import Trainer
from secateur.report.run_facts import Cell
from secateur.report.run_files import read_run
from secateur.train.engine import Run as Stretch
from secateur.train.engine import update
from tests.guard.source import ROOT
from tests.unit.conftest import Run
from tests.unit.test_recipe import Data, files, network, weights

HERE = "tests.unit.test_recipe_compare"
pytestmark = pytest.mark.filterwarnings("ignore:.*left with nothing")  # the networks are tiny
TEXT = f"""
name: tiny
folder: runs/tiny
seeds: [0, 1]
threads: 1
data: {{call: "tests.unit.test_recipe:data", args: {{count: 64}}}}
model: "tests.unit.test_recipe:network"
train: {{epochs: 2, optimizer: {{call: "torch.optim:SGD", args: {{lr: 1e-1}}}}}}
sparsities: [0.5, 0.75]
methods:
  magnitude: {{prune: {{}}, finetune: {{epochs: 1}}}}
  random: {{prune: {{criterion: random}}, finetune: {{epochs: 1}}}}
  small: {{dense: {{model: "{HERE}:narrow"}}, finetune: {{epochs: 1}}}}
"""
TICKETS = "methods.tickets={iterate: {rounds: 1, epochs: 1, controls: [random]}}"


def narrow(density: float) -> nn.Module:
    """As many parameters as the network of 8, 16 and 2 has left: 160 weights less those that went, and 18 biases."""
    width = round((160 * density + 18 - 2) / 11)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))


def no_density() -> nn.Module:
    return network()


class Moving(Data):
    """Its order is another every time it is asked: methods of a seed do not see the same batches."""

    asked = 0

    def train(self, generator: torch.Generator) -> Sequence[tuple[Tensor, Tensor]]:
        self.asked += 1
        return super().train(torch.Generator().manual_seed(self.asked))


def moving(seed: int) -> Data:
    return Moving(seed, 64)


def drawn() -> nn.Module:
    """Not as the seed initialises it."""
    torch.seed()
    return network()


def stops(run: Stretch) -> None:
    """A loop that has had enough after an epoch."""
    for step, batch in run.batches():
        if step >= run.first + run.steps_per_epoch:
            return
        update(
            nn.functional.cross_entropy(run.model(batch[0]), batch[1]), run.model, run.optimizer, run.scheduler, "here"
        )


def both(model: nn.Module, data: Data) -> dict[str, float]:
    logits = model(data.x)
    right = float((logits.argmax(1) == data.y).float().mean())
    return {"loss": float(nn.functional.cross_entropy(logits, data.y)), "accuracy": right}


def recipe(folder: Path, *settings: str) -> Any:
    return check(with_settings(parse(TEXT), [f"folder={folder}", *settings]))


def by_name(cells: Sequence[Cell], seed: int = 0) -> dict[tuple[str, float], Cell]:
    return {(c.method, c.asked): c for c in cells if c.seed == seed}


def test_a_cell_knows_its_size_and_what_it_began_with(tmp_path: Path) -> None:
    cells = run(recipe(tmp_path / "r", TICKETS))
    at, other = by_name(cells), by_name(cells, 1)
    dense, half = at["dense", 0.0], at["magnitude", 0.5]
    # 8 x 16 and 16 x 2 weights and 18 biases; two operations a weight.
    assert (dense.parameters, dense.nonzero, dense.flops, dense.effective_flops) == (178, 178, 320, 320)
    assert (half.parameters, half.nonzero, half.flops) == (178, 178 - 80, 320) and half.effective_flops == 160
    assert half.begins["dense"] == dense.begins["dense"] != other["dense", 0.0].begins["dense"]
    assert at["tickets", 0.75].begins["init"] == dense.begins["init"] != other["dense", 0.0].begins["init"]
    assert len({c.begins["batch"] for c in at.values() if "batch" in c.begins}) == 1
    assert {c.control for c in cells if c.method in ("random", "tickets, random")} == {"random"}
    assert all(c.whole for c in cells) and len({c.recipe for c in cells}) == 1


def test_the_small_dense_network_has_as_many_parameters_and_as_many_epochs(tmp_path: Path) -> None:
    cells = run(recipe(tmp_path / "r", "export={method: small, sparsity: 0.75}"))
    at = by_name(cells)
    small, pruned = at["small", 0.75], at["magnitude", 0.75]
    assert small.epochs == pruned.epochs == 3 and small.control == "small dense" and small.sparsity == 0.0
    assert small.parameters == small.nonzero and abs(small.parameters - (pruned.nonzero or 0)) < 11
    assert weights(tmp_path / "r/export")["0.weight"].shape == (5, 8)
    lines = (tmp_path / "r/seed-0/small/0.75.jsonl").read_text().splitlines()
    assert len(lines) == 12, "it trains from its start, for as long as the dense network and the fine-tuning"


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (f"methods.small.dense.model='{HERE}:no_density'", r"no_density cannot be called with density=0\.5"),
        (f"methods.small.dense.model='{HERE}:nothing'", "cannot be found"),
        ("methods.small.prune={}", "one of the four"),
        ("compare.baseline=LAMP", "compare.baseline is a method of this recipe: magnitude, random, small"),
    ],
)
def test_what_cannot_be_run_is_refused_before_training(
    setting: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *a: pytest.fail("trains"))
    with pytest.raises(BadInput, match=text):
        run(recipe(tmp_path / "r", setting))


@pytest.mark.parametrize(
    ("settings", "rule", "text"),
    [
        ([f"data={HERE}:moving"], "same start and data order", "seed 0 has one first batch for dense and another for"),
        ([f"model={HERE}:drawn", TICKETS], "same start and data order", "seed 0 has one set of initial weights for dense"),
        (["methods.magnitude.train={epochs: 3}"], "same start and data order", "one trained dense network for dense and random"),
        (["methods.random.finetune.epochs=2"], "same training budget", "random was trained for 4 epochs, magnitude for 3"),
        ([f"train.loop={HERE}:stops"], "last step, not the best", "dense and small ended before the last update"),
    ],
)  # fmt: skip
def test_what_is_not_alike_is_found(settings: list[str], rule: str, text: str, tmp_path: Path) -> None:
    asked = recipe(tmp_path / "r", "seeds=[0]", *settings)
    run(asked)
    c = compared(asked)
    found = next(r for r in c.rules if r.name == rule)
    assert not found.kept and text in found.said


def test_what_cells_took_is_measured_and_goes_on_where_a_run_was_broken_off(tmp_path: Path) -> None:
    def break_off(what: str, done: int, total: int) -> None:
        if "magnitude" in what and done == 3:
            raise KeyboardInterrupt

    asked = recipe(tmp_path / "r", "seeds=[0]", TICKETS, "methods.magnitude.finetune.epochs=2")
    with pytest.raises(KeyboardInterrupt):
        run(asked, break_off)
    with pytest.raises(KeyboardInterrupt):
        run(asked, lambda what, done, total: break_off(what, done - 4, total))
    state = torch.load(tmp_path / "r/seed-0/magnitude/0.5.snapshot.pt")
    before = state["taken"]["seconds"]
    cells = run(asked)
    costs = {(c.method, c.asked): c for c in read_run(tmp_path / "r").costs}
    assert costs.keys() == by_name(cells).keys()
    assert json.loads((tmp_path / "r/costs.json").read_text())[0] == vars(costs["dense", 0.0])
    dense, half, ticket = costs["dense", 0.0], costs["magnitude", 0.5], costs["tickets", 0.75]
    assert dense.dense == dense.pruning == 0.0 < dense.training and half.dense == dense.training
    assert half.pruning > 0.0 and half.training > before > 0.0
    assert ticket.training > costs["tickets", 0.5].training, "rounds add up"
    assert all(c.jobs == 1 and c.peak is not None and c.peak > 10**7 for c in costs.values())
    c = compared(asked)
    assert c.jobs == 1 and next(p for p in c.points if p.method == "tickets").training == costs["tickets", 0.5].training


RAY = pytest.param("ray", marks=pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed"))


@pytest.mark.parametrize("engine", ["processes", RAY])
def test_who_computes_the_cells_makes_no_difference(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # where workers find the functions of these tests
    settings = f"model='{HERE}:dropping'", TICKETS, "methods.gradual={prune: {schedule: gradual, min_keep: 4}}"
    told: list[tuple[int, int]] = []
    alone = run(recipe(tmp_path / "alone", *settings))
    beside = run(
        recipe(tmp_path / "beside", *settings),
        lambda what, done, total: told.append((done, total)),
        engine=engine,
        jobs=2,
    )
    assert beside == alone and told == [(i, len(alone)) for i in range(1, len(alone) + 1)]
    assert files(tmp_path / "beside") == files(tmp_path / "alone")
    assert {c.jobs for c in read_run(tmp_path / "beside").costs} == {2}


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))


def test_seeds_may_be_added_and_other_settings_may_not_change(tmp_path: Path) -> None:
    first = run(recipe(tmp_path / "r", "seeds=[0]"))
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*.safetensors")}
    cells = run(recipe(tmp_path / "r", "seeds=[0, 1]"))
    assert cells[: len(first)] == first and {c.seed for c in cells} == {0, 1}
    assert all(p.stat().st_mtime_ns == then for p, then in made.items()) and made
    assert {c.seed for c in read_run(tmp_path / "r").cells} == {0, 1}
    assert {c.seed for c in run(recipe(tmp_path / "r", "seeds=[1]", "compare={metric: accuracy}"))} == {1}
    for setting in ("train.epochs=3", "sparsities=[0.5]"):
        with pytest.raises(BadInput, match="other settings"):
            run(recipe(tmp_path / "r", setting))
    exported = "export={method: magnitude, sparsity: 0.5}"
    run(recipe(tmp_path / "e", "seeds=[0]", exported))
    with pytest.raises(BadInput, match="seeds: "):
        run(recipe(tmp_path / "e", "seeds=[1]", exported))


def test_the_settings_of_an_older_version_are_the_same_settings(tmp_path: Path) -> None:
    asked = recipe(tmp_path / "r", "seeds=[0]")
    run(asked)
    kept = json.loads((tmp_path / "r/run.json").read_text())
    del kept["compare"], kept["lower_is_better"]
    for method in kept["methods"].values():
        if method["dense"] is None:
            del method["dense"]
    (tmp_path / "r/run.json").write_text(json.dumps(kept))
    run(asked)


def test_a_metric_of_which_less_is_better(tmp_path: Path) -> None:
    asked = recipe(tmp_path / "r", f"evaluate={HERE}:both", "lower_is_better=[loss]", "compare.metric=loss")
    run(asked)
    c = compared(asked)
    assert c.metric.name == "loss" and c.metric.sign == -1
    again = compare(tmp_path / "r")
    assert again.metric == c.metric and again.verdicts == c.verdicts and again.points == c.points
    assert "Less is better" in (tmp_path / "r/compare.html").read_text()
    assert "Less is better" in (tmp_path / "r/report.html").read_text()
    for setting in ("lower_is_better=[los]", "compare.metric=los"):
        with pytest.raises(BadInput, match="the recipe names the metric 'los', and what is measured is loss, accuracy"):
            run(recipe(tmp_path / "s", f"evaluate={HERE}:both", setting))


def test_the_command(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "r.yaml").write_text(TEXT)
    asked = ("compare", tmp_path / "r.yaml", "--set", f"folder={tmp_path / 'out'}")
    for wrong, text in (
        (("--baseline", "LAMP"), "compare.baseline is a method of this recipe"),
        (("--found",), "holds no run"),
        (("--engine", "threads"), "--engine is serial, processes or ray"),
        (("--engine", "serial", "--jobs", "2"), "--engine serial runs one after the other"),
        (("--set", "methods={LAMP: {prune: {}}}"), "no method's name begins with 'magnitude'"),
    ):
        done = command(*asked, *wrong)
        assert done.code == 3 and text in done.err and not (tmp_path / "out").exists()
    assert command(*asked, "--quick", "--full").code == 2
    done = command(*asked, "--set", "seeds=[0]")
    assert done.code == 0 and "No verdict: 1 seed in common" in done.out and "compare.html" in done.out
    assert "BROKEN seeds" in done.out and command(*asked).code == 4
    monkeypatch.setattr(Trainer, "fit", lambda *a: pytest.fail("trains"))
    done = command(*asked, "--found", "--baseline", "random", "--json")
    assert done.code == 0 and done.facts["baseline"] == "random" and done.facts["seeds"] == [0, 1]
    told = {r["name"]: r["said"] for r in done.facts["rules"]}
    assert told["nothing missing"].startswith("dense at 0 lacks seed 1")
    assert command(*asked, "--found", "--metric", "loss").code == 3
    assert command(*asked, "--found", "--set", "train.epochs=9").code == 3
