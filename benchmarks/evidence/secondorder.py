"""Where second order starts to pay over magnitude: LeNet-300-100 pruned in one shot, and after a short training of equal length.

A dense network a seed, 12 epochs with Adam on 20,000 pictures. Every method prunes it once, to each sparsity, with nothing
trained after it; then each pruned network is trained for 4 epochs with its zeros held. Methods with data see pictures of the
training part alone, drawn by the seed: those made of gradients 1,000, one gradient a picture, but for the Hessian's diagonal,
which takes its probes over batches of 100; those that go by the inputs of layers 4,000. What each method does was settled before
anything was scored, on another seed, by training pictures held out from training:

- magnitude in one pool, in equal shares, by LAMP; random masks in equal shares;
- Taylor, the diagonals of Fisher matrix and Hessian (8 probes), blocks of 50 of the Fisher matrix (damping 1e-3): one pool;
- WoodFisher: the masks of the latter, and what stays is moved; and the same in eight steps, exponentially, each with the Fisher
  matrix of the network as it is then, of 500 gradients (damping 1e-5);
- least squares: the masks of global magnitude and of LAMP, and what stays is moved to keep each layer's outputs;
- Wanda; SparseGPT in equal shares, in those with all inputs in one block instead of 128 at a time, and in the counts of global
  magnitude; ExactOBS in the latter: layer by layer.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

import secateur
from benchmarks.evidence.common import (
    Task,
    accuracy_of,
    cells,
    data_of,
    drawn,
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
    "woodfisher-steps": ("WoodFisher, step by step", {"solver": "woodfisher"}),
    "refit": ("least squares, masks of global magnitude", {"solver": "refit", "allocation": "global"}),
    "refit-lamp": ("least squares, masks of LAMP", {"solver": "refit", "allocation": "lamp"}),
    "wanda": ("Wanda", {"criterion": "wanda"}),
    "sparsegpt": ("SparseGPT", {"solver": "sparsegpt"}),
    "sparsegpt-global": ("SparseGPT, counts of global magnitude", {"solver": "sparsegpt"}),
    "sparsegpt-wide": ("SparseGPT, all inputs in one block", {"solver": secateur.solvers.SparseGPT(block=784)}),
    "exactobs": ("ExactOBS, counts of global magnitude", {"solver": "exactobs"}),
}
"""The title of each, and what `secateur.prune` is asked beside how much."""
BY_GRADIENTS = ("taylor", "fisher", "obd", "blocks", "woodfisher", "woodfisher-steps")
BASELINE = "global"
LEAST_ABOVE_DIAGONAL = 20.0


@dataclass(frozen=True)
class Size:
    """How much is trained and calibrated.

    Attributes:
        gradients, gradients_a_step: pictures that give a gradient each; the second for WoodFisher step by step.
        inputs: pictures whose inputs to the layers are seen.
        steps: of WoodFisher step by step.
        block: weights a block of the Fisher matrix.
        exact: whether ExactOBS is among the methods, which takes longest.
    """

    train: int = 20_000
    batch: int = 128
    epochs: int = 12
    after: int = 4
    gradients: int = 1000
    gradients_a_step: int = 500
    inputs: int = 4000
    steps: int = 8
    block: int = 50
    scored: int = 10_000
    sparsities: tuple[float, ...] = SPARSITIES
    exact: bool = True


FULL, QUICK = Size(), Size(300, 50, 1, 1, 50, 20, 50, 2, 8, 1000, (0.95,), False)


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, a seed's dense network, and all methods at all sparsities, at once and after training."""
    size = QUICK if quick else FULL
    makers = {"dense": partial(_dense, seed, size)}
    for method in METHODS if size.exact else [m for m in METHODS if m != "exactobs"]:
        for s in size.sparsities:
            makers[f"{method}-{s}"] = partial(_pruned, seed, size, method, s)
    return cells(folder, makers, asdict(size))


def summary(results: list[dict[str, Any]]) -> tuple[list[Table], list[Bar]]:
    """Accuracies at once and after training, differences from global magnitude of the same seed, and what pruning takes."""
    sparsities = [s for s in SPARSITIES if f"{BASELINE}-{s}" in results[0]]
    methods = [m for m in METHODS if f"{m}-{sparsities[0]}" in results[0]]
    heads = ("<", *(f"{s:.0%}" for s in sparsities))
    dense = shown(interval([accuracy_of(r, "dense") for r in results]))
    tables = []
    for key, when in (("at once", "with nothing trained after it"), ("after", "after 4 epochs with the zeros held")):
        levels, above = [("dense", *([dense] * len(sparsities)))], []
        for method in methods:
            title = METHODS[method][0]
            values = {s: [r[f"{method}-{s}"][key] for r in results] for s in sparsities}
            levels.append((title, *(shown(interval(values[s])) for s in sparsities)))
            if method != BASELINE:
                above.append((title, *(shown(_above(results, method, s, key), sign=True) for s in sparsities)))
        what = f"{data_of(results)}, {seeds_of(results)}: accuracy {when}, %, mean ± half of the 95 % interval"
        tables += [
            Table(what, heads, levels),
            Table(f"Above global magnitude {when}, points, paired by seed", heads, above),
        ]
    costs = {m: interval([r[f"{m}-{s}"]["seconds"] for r in results for s in sparsities]).mean for m in methods}
    seconds = [(METHODS[m][0], f"{cost:.2f}") for m, cost in costs.items()]
    tables.append(
        Table("Seconds to prune, calibration included: the mean over sparsities and seeds", ("<", ""), seconds)
    )
    return tables, _bars(results)


def _bars(results: list[dict[str, Any]]) -> list[Bar]:
    diagonals = {
        title: paired(results, partial(_at, "woodfisher", 0.95), partial(_at, method, 0.95)).mean
        for method, title in (("fisher", "diagonal of the Fisher matrix"), ("obd", "diagonal of the Hessian"))
    }
    return [
        Bar(f"one shot, 95%: block Fisher above the {title}, points", found, LEAST_ABOVE_DIAGONAL, at_least=True)
        for title, found in diagonals.items()
    ]


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
    if method in ("sparsegpt-global", "exactobs"):
        counts = {row.name: row.prune or 0 for row in secateur.plan(model, sparsity).chosen}
        asked["allocation"] = partial(_counts, counts)
    if ("criterion" in asked and method != "random") or "solver" in asked:
        asked["calibration"] = _calibration(task, seed, size, method)
    steps = size.steps if method == "woodfisher-steps" else 1
    schedule = secateur.schedules.exponential(sparsity, begin=0, end=steps)
    start = perf_counter()
    for step in range(1, steps + 1):
        secateur.prune(model, schedule(step), **asked)
    seconds = perf_counter() - start
    at_once = task.accuracy(model)
    more = size.after * task.steps
    made = _made(model, more, 6e-4)
    fit(model, task, seed + 1000, more, made, secateur.Pruner(model, made[0]))
    return {**scored(model, task), "at once": at_once, "after": task.accuracy(model), "seconds": seconds}


def _counts(counts: dict[str, int], rows: Any, sparsity: float) -> dict[str, int]:
    return {row.name: counts[row.name] for row in rows}


def _calibration(task: Task, seed: int, size: Size, method: str) -> secateur.Calibration:
    """Pictures of the training part, of all classes: the same for every method that looks at as many."""
    if method not in BY_GRADIENTS:
        return secateur.Calibration(list(drawn(task, seed, size.inputs, 100)), blocks="layers")
    by_steps = method == "woodfisher-steps"
    batches = list(drawn(task, seed, size.gradients_a_step if by_steps else size.gradients, 100))
    damping = 1e-5 if by_steps else 1e-3
    return secateur.Calibration(
        batches, loss=_loss, per_sample=method != "obd", probes=8, block=size.block, damping=damping, seed=seed
    )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
