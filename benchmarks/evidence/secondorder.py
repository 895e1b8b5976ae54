"""LeNet-300-100 pruned at once: where methods that look at data pay over magnitude, without training after it and with a little.

A dense network is trained once a seed. Each method prunes a copy of it, which is scored as it is, then fine-tuned, the same for
all, and scored again. All weights are one pool, but where the name of a method says otherwise:

- magnitude: global, the same share of every layer, LAMP;
- criteria from data: Taylor (one gradient of all pictures), the diagonal of the Fisher matrix, that of the Hessian (Hutchinson),
  blocks of the Fisher matrix;
- solvers, which move the weights that stay: WoodFisher, at once and step by step, each step with the Fisher matrix of the network
  as it is then; and layer by layer, on the layers' inputs: least squares for global magnitude's mask; SparseGPT and ExactOBS,
  which choose themselves, with global magnitude's counts;
- random masks, the control.

Calibration sees pictures of the training part. Its options were chosen on a network of another seed, by training pictures that
were held out from its training.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

import secateur
from benchmarks.evidence.common import (
    Task,
    cells,
    data_of,
    fit,
    linear_rate,
    paired,
    pictures_for,
    seeded,
    seeds_of,
    shown,
)
from benchmarks.result import Bar, Table
from examples.life.nets import lenet
from secateur.evaluate.statistics import interval

NAME = "secondorder"
TITLE = "Second order against magnitude, at once"
SEEDS = (0, 1, 2, 3, 4)

SPARSITIES = (0.9, 0.95, 0.98, 0.99)
METHODS = {
    "random": "random masks", "global": "magnitude, global", "uniform": "magnitude, uniform", "lamp": "magnitude, LAMP",
    "taylor": "Taylor", "fisher": "Fisher, diagonal", "obd": "OBD, Hessian's diagonal", "blocks": "Fisher, blocks: masks alone",
    "woodfisher": "WoodFisher", "steps": "WoodFisher, step by step", "refit": "least squares, magnitude's masks",
    "sparsegpt": "SparseGPT, magnitude's counts", "exactobs": "ExactOBS, magnitude's counts",
}  # fmt: skip
MAGNITUDES = ("global", "lamp")
"""What the others are compared with."""
PHASES = {"at once": "as pruned", "tuned": "fine-tuned"}
RATE, RATE_AFTER = 1.2e-3, 6e-4


@dataclass(frozen=True)
class Size:
    """How much is trained and looked at.

    Attributes:
        epochs, tuning: of the dense network, and of a pruned one.
        pictures, pictures_a_step: that give a gradient each; the second for WoodFisher step by step.
        inputs: pictures whose inputs to the layers are looked at.
        probes: draws of signs for each 50 pictures, for the Hessian's diagonal.
        steps: of WoodFisher step by step.
        block: weights a block of the Fisher matrix.
        damping, damping_a_step: of it.
        exact: whether ExactOBS is among the methods, which takes longest.
    """

    train: int = 20_000
    batch: int = 128
    epochs: int = 15
    tuning: int = 2
    scored: int = 10_000
    pictures: int = 1000
    pictures_a_step: int = 500
    inputs: int = 2000
    probes: int = 5
    steps: int = 8
    block: int = 50
    damping: float = 1e-3
    damping_a_step: float = 1e-5
    sparsities: tuple[float, ...] = SPARSITIES
    exact: bool = True


FULL = Size()
QUICK = Size(500, 50, 2, 1, 1000, 40, 20, 100, 1, 2, 8, sparsities=(0.9, 0.98), exact=False)


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, a seed's dense network and what each method makes of it."""
    size = QUICK if quick else FULL
    makers: dict[str, Callable[[], dict[str, Any]]] = {"dense": partial(_dense, seed, folder, size)}
    for s in size.sparsities:
        for method in METHODS:
            if size.exact or method != "exactobs":
                makers[f"{method}-{s}"] = partial(_pruned, seed, folder, size, method, s)
    return cells(folder, makers, asdict(size))


# What was found

Results = Sequence[Mapping[str, Mapping[str, Any]]]


def summary(results: Results) -> tuple[list[Table], list[Bar]]:
    """Accuracies as pruned and fine-tuned, how far each method is above magnitude of the same seed, and what it takes."""
    dense = shown(interval([r["dense"]["accuracy"] for r in results]))
    title = f"{data_of(results)}, {seeds_of(results)}, dense {dense}: accuracy, %, mean ± half of the 95 % interval"
    tables = []
    for phase, told in PHASES.items():
        levels = [_level(results, m, phase) for m in _methods(results)]
        tables.append(Table(f"{title if phase == 'at once' else 'Accuracy, %'}; {told}", _heads(results), levels))
        for base in MAGNITUDES:
            rows = [_above(results, m, base, phase) for m in _methods(results) if m != base]
            what = f"Above {METHODS[base]}, {told}: points, paired by seed; the last column: the sparsities where the interval is"
            tables.append(Table(f"{what} above zero", (*_heads(results), "pays at"), rows))
    return [*tables, _costs(results)], _bars(results)


def _sparsities(results: Results) -> list[str]:
    return sorted({name.rpartition("-")[2] for name in results[0]} - {"dense"})


def _methods(results: Results) -> list[str]:
    return [m for m in METHODS if f"{m}-{_sparsities(results)[0]}" in results[0]]


def _heads(results: Results) -> tuple[str, ...]:
    return ("<", *(f"{float(s):.0%}" for s in _sparsities(results)))


def _score(result: Any, method: str, sparsity: str, phase: str) -> float:
    return float(result[f"{method}-{sparsity}"][phase]["accuracy"])


def _level(results: Results, method: str, phase: str) -> tuple[str, ...]:
    found = (interval([_score(r, method, s, phase) for r in results]) for s in _sparsities(results))
    return (METHODS[method], *(shown(i) for i in found))


def _above(results: Results, method: str, base: str, phase: str) -> tuple[str, ...]:
    more = {s: _more(results, method, base, s, phase) for s in _sparsities(results)}
    pays = [f"{float(s):.0%}" for s, i in more.items() if i.excludes_zero and i.mean > 0]
    return (METHODS[method], *(shown(i, sign=True) for i in more.values()), ", ".join(pays))


def _more(results: Results, method: str, base: str, sparsity: str, phase: str) -> Any:
    a, b = (partial(_score, method=m, sparsity=sparsity, phase=phase) for m in (method, base))
    return paired(results, a, b)


def _costs(results: Results) -> Table:
    rows = []
    for m in _methods(results):
        seconds = [r[f"{m}-{s}"]["seconds"] for r in results for s in _sparsities(results)]
        rows.append((METHODS[m], f"{interval(seconds).mean:.2f}"))
    return Table("Seconds to prune, calibration included, the mean over sparsities and seeds", ("<", "seconds"), rows)


def _bars(results: Results) -> list[Bar]:
    bars = []
    for s in _sparsities(results):
        above = _more(results, "woodfisher", "global", s, "at once").mean
        bars.append(
            Bar(f"{float(s):.0%}, WoodFisher as pruned: above global magnitude, points", above, 0, at_least=True)
        )
    least = {
        (m, s): _more(results, m, "random", s, "at once").mean
        for m in _methods(results) if m != "random" for s in _sparsities(results)
    }  # fmt: skip
    (method, s), found = min(least.items(), key=lambda item: item[1])
    what = f"least above random masks, as pruned ({METHODS[method]}, {float(s):.0%}), points"
    return [*bars, Bar(what, found, 0, at_least=True)]


# What is trained


def _task(seed: int, size: Size) -> Task:
    return pictures_for(seed, size.train, size.batch, size.scored)


def _made(model: nn.Module, rate: float, steps: int) -> tuple[Optimizer, Any]:
    optimizer = Adam(model.parameters(), lr=rate, fused=True)
    return optimizer, linear_rate(optimizer, steps)


def _dense(seed: int, folder: Path, size: Size) -> dict[str, Any]:
    task = _task(seed, size)
    return {"accuracy": task.accuracy(_start(seed, folder, size)), "data": task.name}


def _start(seed: int, folder: Path, size: Size) -> nn.Module:
    """The dense network: trained, or read from beside the cells."""
    task, model = _task(seed, size), seeded(lenet, seed)
    path = folder / "start.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    steps = size.epochs * task.steps
    fit(model, task, seed, steps, _made(model, RATE, steps))
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".start.{os.getpid()}"
    save_file(model.state_dict(), part)
    part.replace(path)
    return model.eval()


def _pruned(seed: int, folder: Path, size: Size, method: str, sparsity: float) -> dict[str, Any]:
    """A pruned copy of the dense network, scored as it is and fine-tuned."""
    task, model = _task(seed, size), _start(seed, folder, size)
    start = perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", secateur.SecateurWarning)  # a layer left with nothing: the scores tell
        WAYS[method](model, sparsity, task, size, seed)
        seconds = perf_counter() - start
        once = task.accuracy(model)
        steps = size.tuning * task.steps
        made = _made(model, RATE_AFTER, steps)
        fit(model, task, seed, steps, made, secateur.Pruner(model, made[0]))
    found = secateur.inspect(model).sparsity
    scores = {phase: {"accuracy": a} for phase, a in zip(PHASES, (once, task.accuracy(model)), strict=True)}
    return {**scores, "sparsity": found, "seconds": seconds, "data": task.name}


Way = Callable[[nn.Module, float, Task, Size, int], None]
"""Prunes a model in place to a sparsity, with what a task and a size offer."""


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _magnitude(model: nn.Module, sparsity: float, task: Task, size: Size, seed: int, allocation: str) -> None:
    secateur.prune(model, sparsity, allocation=allocation)


def _random(model: nn.Module, sparsity: float, task: Task, size: Size, seed: int) -> None:
    secateur.prune(model, sparsity, criterion=secateur.random(seed))


def _singly(task: Task, count: int, **how: Any) -> secateur.Calibration:
    """A gradient for each of ``count`` pictures."""
    return secateur.Calibration([(task.inputs[:count], task.labels[:count])], loss=_loss, per_sample=True, **how)


def _by_gradients(model: nn.Module, sparsity: float, task: Task, size: Size, seed: int, **asked: Any) -> None:
    secateur.prune(
        model, sparsity, calibration=_singly(task, size.pictures, block=size.block, damping=size.damping), **asked
    )


def _obd(model: nn.Module, sparsity: float, task: Task, size: Size, seed: int) -> None:
    n = size.pictures
    batches = list(zip(task.inputs[:n].split(50), task.labels[:n].split(50), strict=True))
    how = secateur.Calibration(batches, loss=_loss, probes=size.probes, seed=seed)
    secateur.prune(model, sparsity, criterion="obd", calibration=how)


def _step_by_step(model: nn.Module, sparsity: float, task: Task, size: Size, seed: int) -> None:
    schedule = secateur.schedules.exponential(sparsity, begin=0, end=size.steps)
    how = _singly(task, size.pictures_a_step, block=size.block, damping=size.damping_a_step)
    for step in range(1, size.steps + 1):
        secateur.prune(model, schedule(step), solver="woodfisher", calibration=how)


def _by_inputs(model: nn.Module, sparsity: float, task: Task, size: Size, seed: int, solver: str) -> None:
    """Layer by layer; a solver that chooses itself is given global magnitude's counts."""
    how: dict[str, Any] = {"allocation": "global"}
    if solver != "refit":
        counts = {row.name: row.prune for row in secateur.plan(copy.deepcopy(model), sparsity).chosen}
        how["allocation"] = lambda rows, _: {row.name: counts[row.name] for row in rows}
    calibration = secateur.Calibration([task.inputs[: size.inputs]], blocks="layers")
    secateur.prune(model, sparsity, solver=solver, calibration=calibration, **how)


WAYS: dict[str, Way] = {
    "random": _random,
    "global": partial(_magnitude, allocation="global"),
    "uniform": partial(_magnitude, allocation="uniform"),
    "lamp": partial(_magnitude, allocation="lamp"),
    "taylor": partial(_by_gradients, criterion="taylor"),
    "fisher": partial(_by_gradients, criterion="fisher"),
    "obd": _obd,
    "blocks": partial(_by_gradients, criterion="woodfisher"),
    "woodfisher": partial(_by_gradients, solver="woodfisher"),
    "steps": _step_by_step,
    "refit": partial(_by_inputs, solver="refit"),
    "sparsegpt": partial(_by_inputs, solver="sparsegpt"),
    "exactobs": partial(_by_inputs, solver="exactobs"),
}
