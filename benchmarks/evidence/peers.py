"""Gradual magnitude pruning here beside torch's own two ways, at one budget: LeNet-300-100, 10,000 training pictures, 10 epochs.

Every way starts from the same weights and sees the same batches under the same optimizer and learning rate; masks change after
the same updates, to the same cubic schedule. Like is compared with like:

- within each layer: `secateur.Pruner` with ``allocation="uniform"``, and ``WeightNormSparsifier`` of ``torch.ao.pruning`` on
  single weights with its ``CubicSL``;
- over the model: `secateur.Pruner` with ``allocation="global"``, and a loop over ``torch.nn.utils.prune.global_unstructured``,
  whose amounts are relative to what is left.

What a network really holds at zero is counted in its weights after the peer's own last step (``squash_mask``, ``remove``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn
from torch.ao.pruning import CubicSL, WeightNormSparsifier
from torch.nn.utils import prune as torch_prune
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
    seeded,
    seeds_of,
    shown,
)
from benchmarks.result import Bar, Table
from examples.life.nets import lenet
from secateur.core.schedules import Polynomial
from secateur.evaluate.statistics import interval

NAME = "peers"
TITLE = "Gradual pruning beside torch's own"
SEEDS = (0, 1, 2, 3, 4)

SPARSITIES = (0.9, 0.95)
LAYERS = ("fc1", "fc2", "fc3")
PAIRS = {"uniform": "weightnorm", "global": "loop"}
WAYS = {
    "uniform": "secateur, within each layer", "weightnorm": "WeightNormSparsifier + CubicSL",
    "global": "secateur, over the model", "loop": "loop over torch.nn.utils.prune",
}  # fmt: skip
MOST_WORSE = 0.5


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    train: int = 10_000
    batch: int = 64
    epochs: int = 10
    updates: int = 50
    scored: int = 10_000


FULL, QUICK = Size(), Size(500, 50, 2, 5, 1000)


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, a seed's dense network and what each way makes of it."""
    size = QUICK if quick else FULL
    makers: dict[str, Callable[[], dict[str, Any]]] = {"dense": partial(_trained, seed, size, None, _dense)}
    for s in SPARSITIES:
        makers |= {f"{way}-{s}": partial(_trained, seed, size, s, HOW[way]) for way in WAYS}
    return cells(folder, makers, asdict(size))


def summary(results: list[dict[str, Any]]) -> tuple[list[Table], list[Bar]]:
    """Accuracies, what was really reached, and the differences of each seed."""
    rows, bars = [], []
    dense = partial(accuracy_of, name="dense")
    for s in SPARSITIES:
        for way, title in WAYS.items():
            name = f"{way}-{s}"
            counts = sorted({r[name]["zeros"] for r in results})
            of = results[0][name]["weights"]
            rows.append((
                f"{s:.0%}, {title}", shown(interval([accuracy_of(r, name) for r in results])),
                shown(paired(results, partial(accuracy_of, name=name), dense), sign=True),
                "–".join(f"{c:,}" for c in {counts[0]: 0, counts[-1]: 0}), f"{counts[0] / of:.4%}",
                f"{interval([r[name]['seconds'] for r in results]).mean:.1f}",
            ))  # fmt: skip
        for ours, theirs in PAIRS.items():
            worse = paired(
                results, partial(accuracy_of, name=f"{theirs}-{s}"), partial(accuracy_of, name=f"{ours}-{s}")
            )
            bars.append(Bar(f"{s:.0%}, {WAYS[ours]}: below {WAYS[theirs]}, points", worse.mean, MOST_WORSE))
    title = (
        f"{data_of(results)}, {seeds_of(results)}: accuracy after the last step, %, mean ± half of the 95 % interval; dense "
        f"{shown(interval([dense(r) for r in results]))}"
    )
    heads = ("<", "accuracy", "above dense, paired", "zeros", "sparsity reached", "seconds")
    return [Table(title, heads, rows), _between(results)], bars


def _between(results: list[dict[str, Any]]) -> Table:
    rows = []
    for ours, theirs in PAIRS.items():
        pairs = [
            (partial(accuracy_of, name=f"{ours}-{s}"), partial(accuracy_of, name=f"{theirs}-{s}")) for s in SPARSITIES
        ]
        told = (shown(paired(results, a, b), sign=True) for a, b in pairs)
        rows.append((f"{WAYS[ours]} above {WAYS[theirs]}", *told))
    return Table("Side by side, points, paired by seed", ("<", *(f"{s:.0%}" for s in SPARSITIES)), rows)


# What is trained


Way = Callable[[nn.Module, Optimizer, Polynomial], Callable[[], None]]
"""Sets a way of pruning up; what it returns is called after the last step."""


def schedule_for(sparsity: float, steps: int, updates: int) -> Polynomial:
    """Cubic, from a tenth of the run on, with ``updates`` updates of the mask up to about six tenths of it."""
    begin, every = steps // 10, max(1, steps // 2 // updates)
    return secateur.schedules.cubic(sparsity, begin=begin, end=begin + updates * every, every=every)


def _trained(seed: int, size: Size, sparsity: float | None, way: Way) -> dict[str, Any]:
    task, model = pictures_for(seed, size.train, size.batch, size.scored), seeded(lenet, seed)
    steps = size.epochs * task.steps
    optimizer = Adam(model.parameters(), lr=1.2e-3, fused=True)
    made = optimizer, linear_rate(optimizer, steps)
    start = perf_counter()
    finish = way(model, optimizer, schedule_for(sparsity or 0.0, steps, size.updates))
    fit(model, task, seed, steps, made)
    finish()
    seconds = perf_counter() - start
    return {**_counted(model, task), "seconds": seconds}


def _counted(model: nn.Module, task: Task) -> dict[str, Any]:
    weights = [model.get_submodule(n).weight for n in LAYERS]
    facts = {"zeros": sum(int((w == 0).sum()) for w in weights), "weights": sum(w.numel() for w in weights)}
    return {"accuracy": task.accuracy(model), **facts, "data": task.name}


def _dense(model: nn.Module, optimizer: Optimizer, schedule: Polynomial) -> Callable[[], None]:
    return lambda: None


def _secateur(model: nn.Module, optimizer: Optimizer, schedule: Polynomial, allocation: str) -> Callable[[], None]:
    return secateur.Pruner(model, optimizer, schedule, allocation=allocation).close


def _weightnorm(model: nn.Module, optimizer: Optimizer, schedule: Polynomial) -> Callable[[], None]:
    sparsifier = WeightNormSparsifier(sparsity_level=schedule.target, sparse_block_shape=(1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": f"{n}.weight"} for n in LAYERS])
    total = (schedule.end - schedule.begin) // schedule.every
    cubic = CubicSL(sparsifier, init_sl=0.0, init_t=0, delta_t=1, total_t=total)

    def update(step: int) -> None:
        if step > schedule.begin:
            cubic.step()
        sparsifier.step()

    _after_updates(optimizer, schedule, update)
    return sparsifier.squash_mask


def _loop(model: nn.Module, optimizer: Optimizer, schedule: Polynomial) -> Callable[[], None]:
    parameters = [(model.get_submodule(n), "weight") for n in LAYERS]
    pruned = 0.0

    def update(step: int) -> None:
        nonlocal pruned
        now = schedule(step)
        if now > pruned:
            amount = (now - pruned) / (1 - pruned)
            torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=amount)
        pruned = now

    def finish() -> None:
        for module, name in parameters:
            torch_prune.remove(module, name)

    _after_updates(optimizer, schedule, update)
    return finish


def _after_updates(optimizer: Optimizer, schedule: Polynomial, update: Callable[[int], None]) -> None:
    """Calls ``update(t)`` right after update t of the optimizer, where the schedule moves."""
    done = 0

    def stepped(*_: Any) -> None:
        nonlocal done
        done += 1
        if schedule.begin <= done <= schedule.end and (done - schedule.begin) % schedule.every == 0:
            update(done)

    optimizer.register_step_post_hook(stepped)


HOW: dict[str, Way] = {
    "uniform": partial(_secateur, allocation="uniform"), "global": partial(_secateur, allocation="global"),
    "weightnorm": _weightnorm, "loop": _loop,
}  # fmt: skip
