"""A small residual network, 30 epochs in all for every method at every sparsity, dense training included.

Over what is called dense epochs below the learning rate falls in a straight line from 0.1 to a hundredth of it. The methods were
chosen before anything was scored:

- dense: 30 epochs;
- one-shot, fine-tuned: 20 dense epochs, global magnitude, 10 epochs at the last learning rate;
- one-shot, rate rewound: the same, but the 10 epochs run the last half of the 20's learning rates again;
- random masks, fine-tuned: as one-shot, with masks drawn at random;
- gradual: 30 epochs, `schedules.auto`;
- iterative, fine-tuned: 12 dense epochs and 3 rounds of 6 epochs at the last learning rate, each round taking the same share of
  what is left;
- iterative, rate rewound: the same, but each round runs the last half of the 12's learning rates again (Renda et al.,
  arXiv:2003.02389).

No layer is left without a weight (``min_keep=1``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

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
    trained_once,
    updates,
)  # fmt: skip
from benchmarks.result import Bar, Table
from examples.life.nets import small_resnet
from secateur.evaluate.statistics import interval

NAME = "cnn"
TITLE = "A small residual network at one budget"
SEEDS = (0, 1, 2, 3, 4)

SPARSITIES = (0.8, 0.9, 0.95)
METHODS = {
    "oneshot": "one-shot, fine-tuned", "oneshot-lr": "one-shot, rate rewound", "random": "random masks, fine-tuned",
    "gradual": "gradual", "finetune": "iterative, fine-tuned", "lr": "iterative, rate rewound",
}  # fmt: skip
RATE, FLOOR = 0.1, 0.01
MOST_BELOW_DENSE = 1.0


@dataclass(frozen=True)
class Size:
    """How much is trained: epochs in all, dense before one-shot pruning, dense before the rounds, and of each round."""

    train: int = 20_000
    batch: int = 128
    epochs: int = 30
    before: int = 20
    dense_round: int = 12
    round_epochs: int = 6
    rounds: int = 3
    scored: int = 10_000


FULL, QUICK = Size(), Size(200, 50, 3, 2, 1, 1, 2, 500)


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, a seed's dense network and all methods at all sparsities."""
    size = QUICK if quick else FULL
    makers = {"dense": partial(_dense, seed, size), "start": partial(_start, seed, folder, size)}
    for s in SPARSITIES:
        makers[f"gradual-{s}"] = partial(_gradual, seed, size, s)
        for how in ("finetune", "lr"):
            makers[f"{how}-{s}"] = partial(_iterative, seed, folder, size, s, how)
        for how in ("oneshot", "oneshot-lr", "random"):
            makers[f"{how}-{s}"] = partial(_after_start, seed, folder, size, s, how)
    return cells(folder, makers, asdict(size))


def _less(results: list[dict[str, Any]], a: str, b: str) -> Any:
    """The interval of a - b, paired by seed."""
    return paired(results, partial(accuracy_of, name=a), partial(accuracy_of, name=b))


def summary(results: list[dict[str, Any]]) -> tuple[list[Table], list[Bar]]:
    """Accuracies, differences from the dense network of the same seed, and differences between methods."""
    dense = shown(interval([accuracy_of(r, "dense") for r in results]))
    heads = ("<", *(f"{s:.0%}" for s in SPARSITIES))
    levels = [("dense", dense, dense, dense)]
    below = []
    for method, title in METHODS.items():
        names = [f"{method}-{s}" for s in SPARSITIES]
        levels.append((title, *(shown(interval([accuracy_of(r, n) for r in results])) for n in names)))
        below.append((title, *(shown(_less(results, n, "dense"), sign=True) for n in names)))
    between = [
        (f"{METHODS[a]} above {METHODS[b]}", *(shown(_less(results, f"{a}-{s}", f"{b}-{s}"), sign=True) for s in SPARSITIES))
        for a, b in (("lr", "finetune"), ("oneshot-lr", "oneshot"), ("gradual", "oneshot"), ("lr", "oneshot"),
                     ("gradual", "oneshot-lr"), ("lr", "oneshot-lr"), ("gradual", "lr"))
    ]  # fmt: skip
    title = (
        f"{data_of(results)}, {seeds_of(results)}: accuracy after the last step, %, mean ± half of the 95 % interval"
    )
    tables = [
        Table(title, heads, levels),
        Table("Above the dense network of the same seed, points", heads, below),
        Table("Between methods, points, paired by seed", heads, between),
    ]
    return tables, _bars(results)


def _bars(results: list[dict[str, Any]]) -> list[Bar]:
    two = ("gradual", "lr")
    bars = [
        Bar(f"{METHODS[m]}, 80%: below dense, points", -_less(results, f"{m}-0.8", "dense").mean, MOST_BELOW_DENSE)
        for m in two
    ]
    bars += [
        Bar(f"{METHODS[m]}, {s:.0%}: above one-shot, points", _less(results, f"{m}-{s}", f"oneshot-{s}").mean, 0, at_least=True)
        for s in (0.9, 0.95) for m in two
    ]  # fmt: skip
    least = {
        (m, s): _less(results, f"{m}-{s}", f"random-{s}").mean for m in METHODS if m != "random" for s in SPARSITIES
    }
    (method, s), found = min(least.items(), key=lambda item: item[1])
    what = f"least above random masks ({METHODS[method]}, {s:.0%}), points"
    return [*bars, Bar(what, found, 0, at_least=True)]


# What is trained


def _task(seed: int, size: Size) -> Task:
    return pictures_for(seed, size.train, size.batch, size.scored)


def sgd(model: nn.Module, steps: int, first: int = 0) -> tuple[Optimizer, Any]:
    """The optimizer, and a learning rate that falls over ``steps`` updates; from update ``first`` on."""
    optimizer = SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    return optimizer, linear_rate(optimizer, steps, first, FLOOR)


def _dense(seed: int, size: Size) -> dict[str, Any]:
    task, model = _task(seed, size), seeded(small_resnet, seed)
    steps = size.epochs * task.steps
    fit(model, task, seed, steps, sgd(model, steps))
    return scored(model, task)


def _gradual(seed: int, size: Size, sparsity: float) -> dict[str, Any]:
    task, model = _task(seed, size), seeded(small_resnet, seed)
    steps = size.epochs * task.steps
    made = sgd(model, steps)
    pruner = secateur.Pruner(model, made[0], secateur.schedules.auto(sparsity, steps), min_keep=1)
    fit(model, task, seed, steps, made, pruner)
    return scored(model, task)


def _iterative(seed: int, folder: Path, size: Size, sparsity: float, how: Any) -> dict[str, Any]:
    task = _task(seed, size)
    found = secateur.iterate(
        seeded(small_resnet, seed), folder / f"{how}-{sparsity}", train=updates, evaluate=task.metrics,
        make_optimizer=partial(sgd, steps=size.dense_round * task.steps), make_data=task.epoch, epochs=size.dense_round,
        retrain_epochs=size.round_epochs, rounds=size.rounds, target=sparsity, rewind=how, seed=seed, min_keep=1,
    )  # fmt: skip
    return {**found[-1].metrics, "sparsity": found[-1].sparsity, "data": task.name}


def _start(seed: int, folder: Path, size: Size) -> dict[str, Any]:
    return scored(_started(seed, folder, size), _task(seed, size))


def _started(seed: int, folder: Path, size: Size) -> nn.Module:
    """What one-shot pruning and its control begin with."""
    task, model = _task(seed, size), seeded(small_resnet, seed)
    steps = size.before * task.steps
    return trained_once(folder / "start.safetensors", model, lambda: fit(model, task, seed, steps, sgd(model, steps)))


def _after_start(seed: int, folder: Path, size: Size, sparsity: float, how: str) -> dict[str, Any]:
    """One-shot pruning of the network that ``start`` left, and what epochs are left."""
    task, model = _task(seed, size), _started(seed, folder, size)
    criterion = secateur.random(seed) if how == "random" else "magnitude"
    secateur.prune(model, sparsity, criterion=criterion, min_keep=1)
    before, after = size.before * task.steps, (size.epochs - size.before) * task.steps
    made = sgd(model, before, first=before - after if how == "oneshot-lr" else before)
    fit(model, task, seed, after, made, secateur.Pruner(model, made[0]))
    return scored(model, task)
