"""The studies in their quick form: cells are made once and whole, read after that, and compared within their seed."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import common
from benchmarks.evidence.common import Setup, Task, Unfinished, using
from tests.guard.source import ROOT

pytestmark = [  # the quick form trains for a few steps, and sees few inputs
    pytest.mark.filterwarnings("ignore:at step .* left with nothing"),
    pytest.mark.filterwarnings("ignore:fewer inputs than features"),
]
GENERATOR = ("mnist1d", "scipy", "matplotlib", "requests")
LAST = {
    "mnist1d": "reinit-0.98",
    "lenet": "reinit-2",
    "cnn": "random-0.95",
    "peers": "loop-0.95",
    "regularize": "group-lasso-0.1",
    "movement": "soft-0.0001",
    "secondorder": "sparsegpt-wide-0.95",
}
"""The cell that each study that trains makes last; some need others that are on disk."""

SCORES = ("accuracy", "test", "held out", "at once", "after")


def prepare(name: str, out: Path) -> None:
    """Signals drawn at random, where the package that generates MNIST-1D is not here."""
    if name == "mnist1d" and not all(importlib.util.find_spec(p) for p in GENERATOR):
        draw = np.random.default_rng(0)
        parts = {"x": (400, 40), "x_test": (100, 40)}
        (out / name).mkdir(parents=True)
        np.savez(
            out / name / "data.npz",
            **{k: draw.normal(size=shape) for k, shape in parts.items()},
            **{k.replace("x", "y"): draw.integers(0, 10, shape[0]) for k, shape in parts.items()},
        )


def run(name: str, out: Path, *more: str) -> None:
    command.main([name, "--quick", "--seeds", "3", "--out", str(out), *more])


def on_disk(seed: Path) -> dict[str, str]:
    return {p.stem: p.read_text("utf-8") for p in seed.glob("*.json")}


def moved(found: Any, by: float) -> Any:
    """What a study found, with every accuracy higher by ``by``."""
    if isinstance(found, list):
        return [moved(f, by) for f in found]
    if isinstance(found, dict):
        return {k: v + by if k in SCORES and isinstance(v, float) else moved(v, by) for k, v in found.items()}
    return copy.deepcopy(found)


@pytest.mark.parametrize("name", LAST)
def test_a_study_is_made_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    prepare(name, tmp_path / "quick")
    run(name, tmp_path)
    seed = tmp_path / "quick" / name / "seed-3"
    made = on_disk(seed)
    assert LAST[name] in made
    assert "seed 3: " in capsys.readouterr().out

    run(name, tmp_path)
    assert on_disk(seed) == made

    killed = seed / f"{LAST[name]}.json"
    killed.rename(seed / f".{killed.name}.1")  # what a process that was killed before the renaming leaves
    run(name, tmp_path, "--summary")
    assert f"seed 3 is left out: {killed} is not there" in " ".join(capsys.readouterr().out.split())
    run(name, tmp_path)
    again = on_disk(seed)
    assert {n: f for n, f in again.items() if n != LAST[name]} == {n: f for n, f in made.items() if n != LAST[name]}
    assert steady(again[LAST[name]]) == steady(made[LAST[name]])
    assert again[LAST[name]] != made[LAST[name]]

    differences_are_paired(name, seed)


def steady(cell: str) -> Any:
    """What a cell says, without the seconds it took."""
    facts = json.loads(cell)
    facts["result"].pop("seconds", None)
    return facts["settings"], facts["where"], facts["result"]


def differences_are_paired(name: str, folder: Path) -> None:
    """A seed that is better by ten points throughout widens the intervals of accuracies, and of no difference."""
    study = command.load(name)
    with using(Setup(reading=True)):
        found = study.run_seed(3, folder, True)
    tables, bars = study.summary([found, moved(found, 10.0)])
    texts = [text for table in tables for row in table.rows for text in row]
    differences = [t for t in texts if re.match(r"[+-]\d", t)]
    assert differences
    assert all(t.endswith("± 0.00") for t in differences)
    assert any(t.endswith("± 63.53") for t in texts if t not in differences)  # 10 / √2 · t(0.975, 1) / √2
    alone = study.summary([found])[1]
    assert [round(b.found, 9) for b in bars if "interval" not in b.what] == [
        round(b.found, 9) for b in alone if "interval" not in b.what
    ]


def test_a_seed_is_shared_out_among_processes(tmp_path: Path) -> None:
    run("peers", tmp_path, "--only", "dense")
    seed = tmp_path / "quick" / "peers" / "seed-3"
    assert set(on_disk(seed)) == {"dense"}
    before = on_disk(seed)["dense"]
    run("peers", tmp_path, "--only", "*-0.9")
    found = on_disk(seed)
    assert set(found) == {"dense", "uniform-0.9", "weightnorm-0.9", "global-0.9", "loop-0.9"}
    assert found["dense"] == before


def test_peers_reach_what_they_were_asked(tmp_path: Path) -> None:
    run("peers", tmp_path, "--only", "*-0.9")
    for text in on_disk(tmp_path / "quick" / "peers" / "seed-3").values():
        facts = json.loads(text)["result"]
        assert (facts["zeros"], facts["weights"]) == (239_580, 266_200)


def test_cells(tmp_path: Path) -> None:
    make = partial(dict, accuracy=1.0)
    with using(Setup(reading=True)), pytest.raises(Unfinished):
        common.cell(tmp_path, "a", make, {"epochs": 1})
    assert not list(tmp_path.iterdir())
    assert common.cell(tmp_path, "a", make, {"epochs": (1, 2)}) == {"accuracy": 1.0}
    assert common.cell(tmp_path, "a", dict, {"epochs": (1, 2)}) == {"accuracy": 1.0}
    with pytest.raises(ValueError, match="--out"):
        common.cell(tmp_path, "a", make, {"epochs": (1, 3)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_cell_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        common.cell(tmp_path, "a", lambda: {"accuracy": 1 / 0}, {})
    assert not list(tmp_path.iterdir())


def test_data_sets_are_not_put_together() -> None:
    assert common.data_of([{"dense": {"data": "A"}}, {"dense": {"data": "A"}}]) == "A"
    with pytest.raises(ValueError, match="A, B"):
        common.data_of([{"dense": {"data": "A"}}, {"dense": {"data": "B"}}])


def test_a_loss_that_is_nan_stops() -> None:
    x, y = torch.full((4, 3), float("nan")), torch.zeros(4, dtype=torch.long)
    model = nn.Linear(3, 2)
    made = torch.optim.SGD(model.parameters(), lr=0.1), None
    with pytest.raises(FloatingPointError, match="step 1"):
        common.fit(model, Task("nan", x, y, (x, y), 2), 0, 4, made)


def test_the_last_batch_is_scored_too() -> None:
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]]))
        model.bias.zero_()
    x = torch.ones(common.SCORED_AT_A_TIME + 1, 1)
    x[-1] = -1
    y = torch.ones(len(x), dtype=torch.long)
    assert Task("two", x, y, (x, y), 2).accuracy(model) == 100 * (len(x) - 1) / len(x)


def test_the_page_has_a_place_for_each() -> None:
    text = command.PAGE.read_text("utf-8")
    assert set(re.findall(r"<!-- (\w+) -->.*?<!-- end of \1 -->", text, re.S)) == set(command.STUDIES)


def test_they_run_where_recipes_do_not() -> None:
    """Machines with a GPU that studies are run on have neither pydantic nor what recipes need."""
    names = ", ".join(f"benchmarks.evidence.{n}" for n in ("__main__", *command.STUDIES))
    code = f"import sys, {names}; print(*sorted({{m.partition('.')[0] for m in sys.modules}} & {{'pydantic', 'yaml', 'typer'}}))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not found.stdout.strip()
