"""The report of a run: what lies in its folder, gathered and handed to `secateur.report.run_page`."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import secateur
from secateur import native
from secateur.report.run_facts import Cell, Log, RunFacts
from secateur.report.run_page import render

from .schema import Recipe

OWN_LOOP = (
    "{}: the loop is one of the recipe's own. Rewound are the weights, the optimizer, its learning rate, the random numbers "
    "and the order of the data; what that loop keeps beside them, such as a gradient scaler or an average of the weights, is not."
)


def page(recipe: Recipe, root: Path, cells: Sequence[Cell], seconds: float) -> str:
    """A run as one HTML document that loads nothing."""
    own = [n for n, m in recipe.methods.items() if m.iterate is not None and (m.train or recipe.train).loop is not None]
    methods = list(dict.fromkeys(c.method for c in cells))
    notes = [*(OWN_LOOP.format(n) for n in own), *emptied(cells)]
    facts = {**machine_facts(root), "time": f"{seconds:.0f} s for what this call ran"}
    return render(RunFacts(
        name=recipe.name, about=recipe.about, recipe=recipe_text(recipe), cells=cells, logs=list(_logs(root, methods)),
        facts=facts, notes=notes, percent=percent_of(recipe), lower_is_better=recipe.lower_is_better,
    ))  # fmt: skip


def recipe_text(recipe: Recipe) -> str:
    """A recipe as it might have been written."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=100)


def percent_of(recipe: Recipe) -> list[str]:
    """The metrics that are counted in per cent: the accuracy that is measured where a recipe names no function."""
    return ["accuracy"] if recipe.evaluate is None else []


def emptied(cells: Sequence[Cell]) -> Iterator[str]:
    """What is to be said of layers that were left with nothing."""
    found: dict[tuple[str, float], set[str]] = {}
    for c in cells:
        empty = {name for name, sparsity in c.layers.items() if sparsity == 1.0}
        if empty and c.asked:
            found.setdefault((c.method, c.asked), set()).update(empty)
    for (method, asked), names in found.items():
        told = ", ".join(sorted(names))
        yield f"{method} at {asked:.4g} left nothing of {told}: cap such layers with max_sparsity or min_keep."


def machine_facts(root: Path) -> dict[str, str]:
    """Where a run was made, and what with."""
    kernels = native.isa() if native.available() else "no native kernels"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}",
        "versions": f"secateur {secateur.__version__} ({kernels}), torch {torch.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "folder": str(root),
    }


def _logs(root: Path, methods: list[str]) -> Iterator[Log]:
    """Every log of these methods, in their order; rounds in theirs, ``round 10`` after ``round 9``."""
    found = []
    for path in sorted(root.glob("seed-*/*/*.jsonl")):
        what, comma, control = path.stem.partition(", ")  # "round 3, reinit" is of a control
        method, number = path.parent.name + comma + control, what.split()[-1]
        if method in methods:
            rank = float(number) if number.replace(".", "").isdigit() else 0.0
            found.append((methods.index(method), path.parent, rank, method, what, path))
    for _, _, _, method, what, path in sorted(found):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        seed = int(path.parents[1].name.removeprefix("seed-"))
        columns: dict[str, list[Any]] = {k: [line[k] for line in lines] for k in ("step", "loss", "asked", "found")}
        loss = [float("nan") if v is None else v for v in columns["loss"]]
        yield Log(seed, method, what, columns["step"], loss, columns["asked"], columns["found"])
