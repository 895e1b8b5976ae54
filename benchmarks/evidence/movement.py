"""Movement pruning beside gradual magnitude pruning, where a network that was trained for one task is fine-tuned for another.

LeNet-300-100 learns to tell five classes of pictures apart, and then, with an output layer drawn anew, the other five, from 2,000
pictures, for 20 epochs of Adam with a learning rate that falls linearly to zero. Pruned is only then, and only the two
hidden layers, globally, by ``schedules.cubic`` from a tenth to seven tenths of the updates. Movement pruning makes masks until
nine tenths. Every network of a seed begins with the same weights and sees the same batches; the last step counts.

The learning rate decides how far weights move from where they were, so all of `RATES` are shown, and one is chosen for each
method and sparsity on 2,000 pictures held out. Soft movement pruning cannot be told how sparse to get: the others are
run at the sparsity that it came out with, at one learning rate. Its own settings were found on the pictures held out of a
seed that is not among those here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
)  # fmt: skip
from benchmarks.result import Bar, Table
from examples.life.nets import lenet
from secateur import dynamic, schedules
from secateur.evaluate.statistics import interval

NAME = "movement"
TITLE = "Movement against magnitude, where a network is fine-tuned for another task"
SEEDS = (0, 1, 2, 3, 4)

CLASSES = 5
SPARSITIES = (0.9, 0.97)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
METHODS = ("magnitude", "movement")
SOFT_RATE, SCORE_RATE, STRENGTHS = 3e-4, 1000.0, (1e-4, 1e-3)
EVERY = 8
"""Updates between two masks."""

Cell = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is trained: pictures of all ten classes, of the second five to tune on, batch, epochs of both, and which cells."""

    train: int = 20_000
    tuned: int = 2_000
    batch: int = 64
    before: int = 10
    epochs: int = 20
    scored: int = 10_000
    all: bool = True


FULL, QUICK = Size(), Size(500, 100, 32, 1, 2, 500, False)


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, every network of a seed."""
    size = QUICK if quick else FULL
    rates, sparsities, strengths = (RATES, SPARSITIES, STRENGTHS) if size.all else (RATES[2:4], (0.9,), STRENGTHS[:1])
    makers = {}
    for rate in rates:
        makers[f"dense-{rate:g}"] = partial(_cell, seed, size, rate, "dense", 0.0)
        makers[f"fresh-{rate:g}"] = partial(_cell, seed, size, rate, "fresh", 0.0)
        for method in METHODS:
            for s in sparsities:
                makers[f"{method}-{rate:g}-{s}"] = partial(_cell, seed, size, rate, method, s)
    for strength in strengths:
        makers[f"soft-{strength:g}"] = partial(_soft, seed, size, strength)
    return cells(folder, makers, asdict(size))


# What is trained


@dataclass(frozen=True)
class Split:
    """The task that comes first, and the one that is tuned for, the latter scored on pictures held out too."""

    first: Task
    second: Task
    held_out: Task


@lru_cache(1)
def split(seed: int, size: Size) -> Split:
    """Five classes to begin with, the other five to tune for; training pictures of each class in an order drawn from the seed."""
    task = pictures_for(seed, size.train, size.batch, size.scored)
    first, second = (_classes(task.inputs, task.labels, low) for low in (0, CLASSES))
    tests = [_classes(*task.test, low) for low in (0, CLASSES)]
    tuned, held = [], []
    for c in range(CLASSES):
        of_class = (second[1] == c).nonzero().flatten()
        each = min(size.tuned // CLASSES, len(of_class) // 2)
        tuned.append(of_class[:each])
        held.append(of_class[each : 2 * each])
    parts = [tuple(t[torch.cat(index)] for t in second) for index in (tuned, held)]
    return Split(
        Task(task.name, *first, tests[0], size.batch),
        Task(task.name, *parts[0], tests[1], size.batch),
        Task(task.name, *parts[1], parts[1], size.batch),
    )


def _classes(inputs: Tensor, labels: Tensor, low: int) -> tuple[Tensor, Tensor]:
    mine = (labels >= low) & (labels < low + CLASSES)
    return inputs[mine], labels[mine] - low


def _net() -> nn.Module:
    model = lenet()
    model.fc3 = nn.Linear(100, CLASSES)
    return model


def _made(model: nn.Module, rate: float, steps: int) -> tuple[Optimizer, Any]:
    optimizer = Adam(model.parameters(), lr=rate, fused=True)
    return optimizer, linear_rate(optimizer, steps)


@lru_cache(1)
def _pretrained(seed: int, size: Size) -> dict[str, Tensor]:
    """The hidden layers after the first task."""
    task, model = split(seed, size).first, seeded(_net, seed)
    steps = size.before * task.steps
    fit(model, task, seed, steps, _made(model, 1.2e-3, steps))
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("fc3")}


def tune(seed: int, size: Size, rate: float, method: str, how: Any) -> tuple[nn.Module, Cell]:
    """Fine-tunes one network. ``how`` is a sparsity, or for ``"soft"`` what `dynamic.soft_movement` made."""
    data, model = split(seed, size), seeded(_net, seed + 1000)
    if method != "fresh":
        model.load_state_dict(_pretrained(seed, size), strict=False)
    steps = size.epochs * data.second.steps
    made = _made(model, rate, steps)
    pruner = None
    if method == "soft":
        pruner = secateur.Pruner(model, made[0], ignore="fc3", rewire=how)
    elif method in METHODS:
        rewire = dynamic.movement(every=EVERY, end=last(steps)) if method == "movement" else None
        pruner = secateur.Pruner(model, made[0], rise(how, steps), ignore="fc3", rewire=rewire)
    fit(model, data.second, seed, steps, made, pruner)
    scores = {"accuracy": data.second.accuracy(model), "held out": data.held_out.accuracy(model)}
    return model, {**scores, "sparsity": 0.0 if pruner is None else pruner.sparsity, "data": data.second.name}


def rise(target: float, steps: int) -> Any:
    """From a tenth to seven tenths of the updates."""
    return schedules.cubic(target, begin=steps // 10, end=steps * 7 // 10, every=EVERY)


def last(steps: int) -> int:
    """The update after which masks stay."""
    return steps * 9 // 10


def _cell(seed: int, size: Size, rate: float, method: str, sparsity: float) -> Cell:
    return tune(seed, size, rate, method, sparsity)[1]


def _soft(seed: int, size: Size, strength: float) -> Cell:
    """Soft movement pruning, and the others at the sparsity that it came out with."""
    steps = size.epochs * split(seed, size).second.steps
    how = dynamic.soft_movement(rise(0.1, steps), lr=SCORE_RATE, strength=strength, every=EVERY, end=last(steps))
    found = tune(seed, size, SOFT_RATE, "soft", how)[1]
    return found | {m: tune(seed, size, SOFT_RATE, m, found["sparsity"])[1] for m in METHODS}


# What is told


def summary(results: list[dict[str, Any]]) -> tuple[list[Table], list[Bar]]:
    """Accuracies at every learning rate, differences at each and at those chosen on pictures held out, and soft movement."""
    rates = [r for r in RATES if f"dense-{r:g}" in results[0]]
    sparsities = [s for s in SPARSITIES if f"magnitude-{rates[0]:g}-{s}" in results[0]]
    rows = [
        (title, *(_levels(results, f"{key}-{r:g}") for r in rates), *_best_level(results, key, "", rates))
        for key, title in (("dense", "dense"), ("fresh", "dense, not trained before"))
    ]
    rows += [
        (
            f"{m}, {s:.0%}",
            *(_levels(results, f"{m}-{r:g}-{s}") for r in rates),
            *_best_level(results, m, f"-{s}", rates),
        )
        for s in sparsities
        for m in METHODS
    ]
    columns = tuple(f"rate {r:g}" for r in rates)
    title = (
        f"{data_of(results)}, {seeds_of(results)}: accuracy after the last step, %, mean ± half of the 95 % interval"
    )
    above = [
        (
            f"{s:.0%}",
            *(shown(_above(results, f"movement-{r:g}-{s}", f"magnitude-{r:g}-{s}"), sign=True) for r in rates),
            shown(_chosen_above(results, s, rates), sign=True),
        )
        for s in sparsities
    ]
    tables = [
        Table(title, ("<", *columns, "rate chosen", "with it"), rows),
        Table("Movement above magnitude, points, paired by seed", ("sparsity", *columns, "rates chosen"), above),
        _soft_table(results),
    ]
    return tables, _bars(results, rates, sparsities)


def _score(result: dict[str, Any], name: str, part: str = "accuracy") -> float:
    return float(result[name][part])


def _levels(results: Sequence[dict[str, Any]], name: str) -> str:
    return shown(interval([_score(r, name) for r in results]))


def _chosen(results: Sequence[dict[str, Any]], head: str, tail: str, rates: Sequence[float]) -> float:
    """The learning rate with the best mean on the pictures held out."""
    return max(rates, key=lambda r: statistics.fmean(_score(x, f"{head}-{r:g}{tail}", "held out") for x in results))


def _best_level(results: Sequence[dict[str, Any]], head: str, tail: str, rates: Sequence[float]) -> tuple[str, str]:
    rate = _chosen(results, head, tail, rates)
    return f"{rate:g}", _levels(results, f"{head}-{rate:g}{tail}")


def _above(results: Sequence[dict[str, Any]], a: str, b: str) -> Any:
    return paired(results, partial(_score, name=a), partial(_score, name=b))


def _chosen_above(results: Sequence[dict[str, Any]], sparsity: float, rates: Sequence[float]) -> Any:
    """Movement above magnitude, each with the learning rate chosen for it."""
    a, b = (f"{m}-{_chosen(results, m, f'-{sparsity}', rates):g}-{sparsity}" for m in ("movement", "magnitude"))
    return _above(results, a, b)


def _soft_table(results: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for strength in STRENGTHS:
        found = [r[f"soft-{strength:g}"] for r in results if f"soft-{strength:g}" in r]
        if found:
            sparsity = interval([100 * f["sparsity"] for f in found])
            differences = (interval([f["accuracy"] - f[m]["accuracy"] for f in found]) for m in METHODS)
            accuracy = shown(interval([f["accuracy"] for f in found]))
            rows.append((f"{strength:g}", shown(sparsity), accuracy, *(shown(d, sign=True) for d in differences)))
    heads = ("strength", "sparsity, %", "accuracy", *(f"above {m}" for m in METHODS))
    return Table(
        f"Soft movement, rate {SOFT_RATE:g}, and the others at the sparsity that it came out with", heads, rows
    )


def _bars(results: Sequence[dict[str, Any]], rates: Sequence[float], sparsities: Sequence[float]) -> list[Bar]:
    """What the paper claims: more than magnitude where little is kept."""
    most = sparsities[-1]
    low = _above(results, f"movement-{rates[0]:g}-{most}", f"magnitude-{rates[0]:g}-{most}")
    best = _chosen_above(results, most, rates)
    return [
        Bar(f"{most:.0%}, rate {rates[0]:g}: movement above magnitude, points", low.mean, 0, at_least=True),
        Bar(f"{most:.0%}, rates chosen: movement above magnitude, points", best.mean, 0, at_least=True),
    ]
