"""Where second order starts to pay over magnitude: LeNet-300-100 pruned in one shot, and after a short training of equal length.

A dense network a seed, 12 epochs with Adam on 20,000 pictures. Every method prunes it once, to each sparsity, with nothing
trained after it; then each pruned network is trained for 4 epochs with its zeros held. Methods with data see pictures of the
training part alone, the same 1,000 for all; those made of gradients one gradient a picture, but for the Hessian's diagonal, which
takes its probes over batches of 100. What each method does was settled before anything was scored:

- magnitude in one pool, in equal shares, by LAMP; random masks in equal shares;
- Taylor, the diagonals of Fisher matrix and Hessian (8 probes), blocks of 50 of the Fisher matrix (damping 1e-3): one pool;
- WoodFisher: the masks of the latter, and what stays is moved;
- Wanda; SparseGPT and ExactOBS: layer by layer, in equal shares, SparseGPT also in the counts of global magnitude;
- SparseGPT with all inputs in one block instead of 128 at a time. This row was added after the others had been seen.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

import secateur
from benchmarks.evidence.common import (
    Task,
    accuracy_of,
    cells,
    data_of,
    fit,
    linear_rate,
    paired,
    pictures_for,
    scored,
    seeded,
    seeds_of,
    shown,
)  # fmt: skip
from benchmarks.result import Bar, Table
from examples.life.nets import lenet
from secateur.evaluate.statistics import interval

NAME = "secondorder"
TITLE = "Second order and magnitude, one shot and a little training"
SEEDS = (0, 1, 2, 3, 4)

SPARSITIES = (0.9, 0.95, 0.98, 0.99)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "global": ("magnitude, global", {}),
    "uniform": ("magnitude, uniform", {"allocation": "uniform"}),
    "lamp": ("magnitude, LAMP", {"allocation": "lamp"}),
    "random": ("random", {"allocation": "uniform"}),
    "taylor": ("Taylor", {"criterion": "taylor"}),
    "fisher": ("diagonal Fisher", {"criterion": "fisher"}),
    "obd": ("OBD, diagonal Hessian", {"criterion": "obd"}),
    "blocks": ("block Fisher, masks alone", {"criterion": "woodfisher"}),
    "woodfisher": ("WoodFisher, block Fisher", {"solver": "woodfisher"}),
    "wanda": ("Wanda", {"criterion": "wanda"}),
    "sparsegpt": ("SparseGPT", {"solver": "sparsegpt"}),
    "sparsegpt-global": ("SparseGPT, counts of global magnitude", {"solver": "sparsegpt"}),
    "sparsegpt-wide": ("SparseGPT, all inputs in one block", {"solver": secateur.solvers.SparseGPT(block=784)}),
    "exactobs": ("ExactOBS", {"solver": "exactobs"}),
}
"""The title of each, and what `secateur.prune` is asked beside how much."""
BASELINE = "global"
LEAST_ABOVE_DIAGONAL = 20.0


@dataclass(frozen=True)
class Size:
    """How much is trained and calibrated."""

    train: int = 20_000
    batch: int = 128
    epochs: int = 12
    after: int = 4
    seen: int = 1000
    scored: int = 10_000


FULL, QUICK = Size(), Size(300, 50, 1, 1, 50, 200)


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, a seed's dense network, and all methods at all sparsities, at once and after training."""
    size = QUICK if quick else FULL
    makers = {"dense": partial(_dense, seed, size)}
    for method in METHODS:
        for s in SPARSITIES:
            makers[f"{method}-{s}"] = partial(_pruned, seed, size, method, s)
    return cells(folder, makers, asdict(size))


def summary(results: list[dict[str, Any]]) -> tuple[list[Table], list[Bar]]:
    """Accuracies at once and after training, and differences from global magnitude of the same seed."""
    heads = ("<", *(f"{s:.0%}" for s in SPARSITIES))
    dense = shown(interval([accuracy_of(r, "dense") for r in results]))
    tables = []
    for key, when in (("at once", "with nothing trained after it"), ("after", "after 4 epochs with the zeros held")):
        levels, above = [("dense", *([dense] * len(SPARSITIES)))], []
        for method, (title, _) in METHODS.items():
            values = {s: [r[f"{method}-{s}"][key] for r in results] for s in SPARSITIES}
            levels.append((title, *(shown(interval(values[s])) for s in SPARSITIES)))
            if method != BASELINE:
                above.append((title, *(shown(_above(results, method, s, key), sign=True) for s in SPARSITIES)))
        what = f"{data_of(results)}, {seeds_of(results)}: accuracy {when}, %, mean ± half of the 95 % interval"
        tables += [
            Table(what, heads, levels),
            Table(f"Above global magnitude {when}, points, paired by seed", heads, above),
        ]
    diagonals = {
        title: paired(results, partial(_at, "woodfisher", 0.95), partial(_at, method, 0.95)).mean
        for method, title in (("fisher", "diagonal of the Fisher matrix"), ("obd", "diagonal of the Hessian"))
    }
    bars = [
        Bar(f"one shot, 95%: block Fisher above the {title}, points", found, LEAST_ABOVE_DIAGONAL, at_least=True)
        for title, found in diagonals.items()
    ]
    return tables, bars


def _above(results: list[dict[str, Any]], method: str, s: float, key: str) -> Any:
    return paired(results, lambda r: r[f"{method}-{s}"][key], lambda r: r[f"{BASELINE}-{s}"][key])


def _at(method: str, s: float, result: dict[str, Any]) -> float:
    return float(result[f"{method}-{s}"]["at once"])


# What is trained


def _task(seed: int, size: Size) -> Task:
    return pictures_for(seed, size.train, size.batch, size.scored)


def _made(model: nn.Module, steps: int, rate: float) -> tuple[Optimizer, Any]:
    optimizer = Adam(model.parameters(), lr=rate, fused=True)
    return optimizer, linear_rate(optimizer, steps)


@lru_cache(1)
def _trained(seed: int, size: Size) -> nn.Module:
    """The dense network of a seed; trained once a process."""
    task, model = _task(seed, size), seeded(lenet, seed)
    steps = size.epochs * task.steps
    fit(model, task, seed, steps, _made(model, steps, 1.2e-3))
    return model


def _dense(seed: int, size: Size) -> dict[str, Any]:
    return scored(_trained(seed, size), _task(seed, size))


def _pruned(seed: int, size: Size, method: str, sparsity: float) -> dict[str, Any]:
    task, model = _task(seed, size), copy.deepcopy(_trained(seed, size))
    asked = dict(METHODS[method][1])
    if method == "random":
        asked["criterion"] = secateur.random(seed)
    if method == "sparsegpt-global":
        counts = {row.name: row.prune or 0 for row in secateur.plan(model, sparsity).chosen}
        asked["allocation"] = partial(_counts, counts)
    if ("criterion" in asked and method != "random") or "solver" in asked:
        asked["calibration"] = _calibration(task, size, method)
    secateur.prune(model, sparsity, **asked)
    at_once = task.accuracy(model)
    steps = size.after * task.steps
    made = _made(model, steps, 6e-4)
    fit(model, task, seed + 1000, steps, made, secateur.Pruner(model, made[0]))
    return {**scored(model, task), "at once": at_once, "after": task.accuracy(model)}


def _counts(counts: dict[str, int], rows: Any, sparsity: float) -> dict[str, int]:
    return {row.name: counts[row.name] for row in rows}


def _calibration(task: Task, size: Size, method: str) -> secateur.Calibration:
    """The same pictures of the training part for every method."""
    x, y = task.inputs[: size.seen], task.labels[: size.seen]
    batches = list(zip(x.split(100), y.split(100), strict=True))
    each = method not in ("obd", "wanda", "exactobs") and not method.startswith("sparsegpt")
    return secateur.Calibration(
        batches, loss=_loss, blocks="layers", per_sample=each, probes=8, block=50, damping=1e-3, seed=0
    )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.enable_grad():
        return F.cross_entropy(model(batch[0]), batch[1])
