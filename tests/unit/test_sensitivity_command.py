"""``secateur sensitivity``: a recipe's dense network, on data that does not judge it, and what lies in the folder then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur
from secateur.errors import BadInput
from secateur.evaluate.sensitivity_facts import Sensitivity
from secateur.recipe.load import check, parse, with_settings
from secateur.recipe.run import run
from secateur.recipe.sensitivity import BATCHES, Scanned, scan
from tests.guard.source import ROOT
from tests.unit import test_recipe
from tests.unit.conftest import Run, tree

HERE = "tests.unit.test_sensitivity_command"
# Networks this small may lose nothing at all, or everything.
pytestmark = pytest.mark.filterwarnings("ignore::secateur.SecateurWarning")
TEXT = f"""
name: tiny
folder: runs/tiny
seeds: [0, 1]
data: {{call: "{HERE}:data", args: {{count: 64}}}}
model: "tests.unit.test_recipe:network"
train: {{epochs: 2, optimizer: {{call: "torch.optim:SGD", args: {{lr: 1e-1}}}}}}
sparsities: [0.5]
methods:
  one-shot: {{prune: {{}}}}
quick: {{train.epochs: 1}}
"""


class Held(test_recipe.Data):
    """Data with a validation part."""

    def __init__(self, seed: int, count: int) -> None:
        super().__init__(seed, count)
        g = torch.Generator().manual_seed(100 + seed)
        x = torch.randn(80, 8, generator=g)
        self.validation = x, (x[:, 0] > 0).long()


def data(seed: int, count: int) -> Held:
    return Held(seed, count)


def sizes(model: nn.Module, some: Any) -> dict[str, float]:
    """An evaluate that tells what it was given."""
    test = some.test
    count = sum(len(y) for _, y in test) if isinstance(test, list) else len(test[1])
    return {"loss": count + float((model[0].weight == 0).sum()), "kind": float(isinstance(test, list))}  # type: ignore[index]


def recipe(folder: Path, *settings: str) -> Any:
    return check(with_settings(parse(TEXT), [f"folder={folder}", *settings]))


def plain(found: Scanned) -> tuple[float, str]:
    return found.scan.baseline, found.scan.facts["measured on"]


def test_it_measures_the_dense_network_of_a_run_on_the_validation_part(tmp_path: Path) -> None:
    asked = recipe(tmp_path / "r")
    run(asked)
    before = tree(tmp_path / "r")
    found = scan(asked, (0.5, 0.9))
    after = tree(tmp_path / "r")
    assert {n: b for n, b in after.items() if not n.startswith("sensitivity/")} == before
    assert found.folder == tmp_path / "r" / "sensitivity" and Sensitivity.from_json(
        after["sensitivity/sensitivity.json"].decode()
    ) == found.scan  # fmt: skip
    model = test_recipe.network()
    model.load_state_dict(load_file(tmp_path / "r" / "seed-0" / "dense" / "0" / "weights.safetensors"))
    x, y = data(0, 64).validation
    with torch.no_grad():
        assert found.scan.baseline == pytest.approx(100 * float((model(x).argmax(1) == y).float().mean()))
    secateur.prune(model, 0.9, include="0")
    with torch.no_grad():
        left = 100 * float((model(x).argmax(1) == y).float().mean())
    assert found.scan.drop("0.weight", 0.9) == pytest.approx(found.scan.baseline - left)
    assert found.scan.facts["measured on"] == "the validation part"


def test_it_trains_what_is_not_there_and_a_run_goes_on_from_it(tmp_path: Path) -> None:
    asked = recipe(tmp_path / "r")
    scan(asked, (0.5,), seed=1)
    scanned = tree(tmp_path / "r")
    assert "seed-1/dense/0/cell.json" in scanned and not (tmp_path / "r" / "seed-0").exists()
    run(asked)
    run(recipe(tmp_path / "alone"))
    name = "seed-1/dense/0/weights.safetensors"
    assert tree(tmp_path / "r")[name] == tree(tmp_path / "alone")[name] == scanned[name]
    assert tree(tmp_path / "r")["results.json"] == tree(tmp_path / "alone")["results.json"]


def test_what_it_is_measured_on(tmp_path: Path) -> None:
    own = f"evaluate={HERE}:sizes"
    held, bare = "data.args.count=64", 'data.call="tests.unit.test_recipe:data"'
    where = iter(range(99))

    def on(part: Any, *settings: str) -> tuple[float, str]:
        return plain(scan(recipe(tmp_path / str(next(where)), *settings), (0.5,), part=part))

    assert on(None, own, held) == (80, "the validation part")
    assert on("train", own, held) == (64, "4 batches of the training part, which the network has learned")
    value, told = on("test", own, held)
    assert value == 64 and "must not be judged" in told
    assert on(None, bare)[1].startswith("4 batches of the training part") and BATCHES > 4
    with pytest.raises(BadInput, match="no part called validation, and its own evaluate may not take training batches"):
        on(None, own, bare)
    with pytest.raises(BadInput, match="no part called validation: give it one, or say --on train"):
        on("validation", bare)
    with pytest.raises(BadInput, match="validation, train, test; got 'all'"):
        on("all", held)
    with pytest.raises(BadInput, match="seeds 0, 1; got 2"):
        scan(recipe(tmp_path / "x"), seed=2)


def test_models_that_take_their_arguments_by_name(tmp_path: Path) -> None:
    asked = recipe(
        tmp_path / "r",
        "data={call: 'tests.unit.test_recipe:named', args: {count: 64}}",
        "model=tests.unit.test_recipe:Speaking",
    )
    found = scan(asked, (0.5,), flops=True)
    assert [x.name for x in found.scan] == ["inner.0.weight", "inner.2.weight"] and found.flops is not None
    assert found.flops.by_weight == {"inner.0.weight": 2 * 128, "inner.2.weight": 2 * 32}


def test_the_command(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "r.yaml").write_text(TEXT)
    out = tmp_path / "out"
    asked = ("sensitivity", tmp_path / "r.yaml", "--set", f"folder={out}", "--sparsities", ".5,.9")
    done = command(*asked)
    assert done.code == 0 and "First layer 0.weight:" in done.out and "measured on: the validation part" in done.out
    assert str(out / "sensitivity" / "report.html") in done.out
    again = command(*asked)
    assert again.code == 4 and "--resume" in again.err
    done = command(*asked, "--resume", "--json")
    assert done.code == 0 and done.facts["sparsities"] == [0.5, 0.9] and "tiny" in done.facts["facts"]["name"]
    assert command(*asked, "--resume", "--criterion", "random").code == 3
    other = command(
        *asked,
        "-o",
        tmp_path / "other",
        "--criterion",
        "random(3)",
        "--group",
        "all=0",
        "--group",
        "all=2",
        "--on",
        "train",
    )
    assert other.code == 0 and "all" in other.out and (tmp_path / "other" / "sensitivity.json").exists()


def test_an_allocation_for_a_recipe(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "r.yaml").write_text(TEXT)
    asked = ("sensitivity", tmp_path / "r.yaml", "--set", f"folder={tmp_path / 'out'}")
    done = command(*asked, "--allocate", 0.8)
    assert done.code == 0 and "128 weights, sparsity 80.0000%" in done.out
    facts = json.loads((tmp_path / "out" / "sensitivity" / "allocation-weights-0.8.json").read_text())
    assert sum(facts["counts"].values()) == 128 and facts["sparsity"] == 0.8
    text = json.dumps(facts["allocation"])
    cells = run(recipe(tmp_path / "used", f"methods.one-shot.prune.allocation={text}", "sparsities=[0.8]", "seeds=[0]"))
    layers = {"0.weight": 128, "2.weight": 32}
    assert {n: round(s * layers[n]) for n, s in cells[1].layers.items()} == facts["counts"]
    done = command(*asked, "--resume", "--allocate", 0.5, "--budget", "flops")
    assert done.code == 0 and "flops, 0.5:" in done.out
    assert command(*asked, "--resume", "--allocate", 0.99).code == 3


def test_slips(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "r.yaml").write_text(TEXT)
    asked = ("sensitivity", tmp_path / "r.yaml", "--set", f"folder={tmp_path / 'out'}")
    for more, words in {
        ("--sparsities", ".5;.9"): "numbers with commas between them",
        ("--group", "all"): "--group takes NAME=GLOB",
        ("--sparsities", "50"): "Did you mean 0.5",
        ("--on", "everything"): "validation, train, test",
        ("--allocate", ".5", "--budget", "time"): "budget is one of",
        ("--metric", "f1"): "no metric 'f1'",
    }.items():
        done = command(*asked, "--resume", *more)
        assert done.code == 3 and words in done.err, done.err
    assert command(*asked, "--quick", "--full").code == 2
    monkeypatch.chdir(tmp_path)
    assert command(*asked[:2], "--quick").code == 0
    assert len((tmp_path / "runs" / "tiny-quick" / "seed-0" / "dense" / "0.jsonl").read_text().splitlines()) == 4


def test_a_batch_of_tensors_is_counted_on_its_first_example(tmp_path: Path) -> None:
    found = scan(recipe(tmp_path / "r"), (0.5,), flops=True)
    assert found.flops is not None and found.flops.total == 2 * (8 * 16 + 16 * 2)
    assert isinstance(data(0, 64).train(torch.Generator())[0][0], Tensor)
