"""Lottery tickets on MNIST-1D (Greydanus and Kobak, arXiv:2011.14439): the published trial, over several seeds.

As published: the residual MLP 40-500-500-10, Adam with rate 0.02, batches of 100 that are not shuffled, 1501 updates, magnitude
within each layer, rewinding to the initial weights. Not as published: 20 rounds instead of 100, so masks grow in larger steps;
only weights are pruned and counted, where the original pools weights and biases of a layer; masks are taken after the last
update, where the original takes them after 1000; the accuracy is that of the last update, never the best.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

import secateur
from benchmarks.evidence.common import Task, cells, current, paired, seeded, seeds_of, shown, updates
from benchmarks.result import Bar, Table
from secateur.evaluate.statistics import interval
from secateur.train.engine import Run
from secateur.train.rounds import Round

NAME = "mnist1d"
TITLE = "Lottery tickets on MNIST-1D"
SEEDS = (0, 1, 2)

DATA = "MNIST-1D"
INSTALL = "pip install mnist1d==0.0.2.post1"
CONTROLS = {"random": "random masks", "random-biases": "random masks, biases too", "reinit": "weights drawn anew"}
CONTROLLED = (0.92, 0.97, 0.98)
PUBLISHED = {0.0: "66.4", 0.8: "72.9", 0.9: "74.3", 0.92: "75.6", 0.95: "69.2", 0.97: "68.1", 0.98: "63.0"}
"""The last accuracy of the one published trial."""
PUBLISHED_RANDOM = {0.92: "60.6", 0.98: "34.6"}


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    steps: int = 1501
    sparsities: tuple[float, ...] = (
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.87, 0.9, 0.92, 0.935, 0.95, 0.96, 0.97, 0.975, 0.98, 0.99,
    )  # fmt: skip


FULL, QUICK = Size(), Size(60, (0.5, 0.8, 0.92, 0.97, 0.98))


class ResidualMLP(nn.Module):
    """The published network: 275,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(40, 500)
        self.linear2 = nn.Linear(500, 500)
        self.linear3 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 40)`` to logits ``(n, 10)``."""
        h = F.relu(self.linear1(x))
        return self.linear3(h + F.relu(self.linear2(h)))


class Cycle:
    """A run's batches, the same few in the same order again and again: to `secateur.iterate` one long epoch."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]], steps: int) -> None:
        self._batches, self._steps = batches, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._batches[i % len(self._batches)] for i in range(self._steps))


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, the ticket's rounds and its controls."""
    size = QUICK if quick else FULL
    makers = {"ticket": partial(_ticket, seed, folder, size)}
    makers |= {f"random-{s}": partial(_random, seed, folder, size, s) for s in CONTROLLED}
    makers |= {f"random-biases-{s}": partial(_random_with_biases, seed, folder, size, s) for s in CONTROLLED}
    makers |= {f"reinit-{s}": partial(_reinit, seed, folder, size, s) for s in CONTROLLED}
    return cells(folder, makers, asdict(size))


def summary(results: list[dict[str, Any]]) -> tuple[list[Table], list[Bar]]:
    """Accuracy of tickets and controls, and the differences of each seed."""
    rounds = [r["asked"] for r in results[0]["ticket"]["rounds"]]
    ticket = {s: partial(_of_round, asked=s) for s in rounds}
    rows = []
    for s in rounds:
        line = [f"{s:.1%}", shown(interval([ticket[s](r) for r in results])), PUBLISHED.get(s, "")]
        line.append(shown(paired(results, ticket[s], ticket[0.0]), sign=True) if s else "")
        for control in CONTROLS:
            of = partial(_of_control, name=f"{control}-{s}")
            line.append(shown(paired(results, ticket[s], of), sign=True) if s in CONTROLLED else "")
        rows.append(tuple(line))
    controls = [
        (f"{s:.0%}", *(shown(interval([_of_control(r, f"{c}-{s}") for r in results])) for c in CONTROLS),
         PUBLISHED_RANDOM.get(s, ""))
        for s in CONTROLLED
    ]  # fmt: skip
    tables = [
        Table(
            f"MNIST-1D, {seeds_of(results)}: accuracy after the last update, %, mean ± half of the 95 % interval; differences "
            "in points, paired by seed",
            ("sparsity", "ticket", "published, one trial", "above dense", *(f"above {c}" for c in CONTROLS.values())), rows,
        ),
        Table("The controls themselves", ("sparsity", *CONTROLS.values(), "random, published"), controls),
    ]  # fmt: skip
    over_dense = paired(results, ticket[0.92], ticket[0.0]).mean
    over_random = paired(results, ticket[0.92], partial(_of_control, name="random-0.92")).mean
    bars = [
        Bar("ticket at 92 % above dense, points", over_dense, 5, at_least=True),
        Bar("ticket at 92 % above random masks, points", over_random, 10, at_least=True),
    ]
    return tables, bars


def _of_round(result: dict[str, Any], asked: float) -> float:
    return next(r["accuracy"] for r in result["ticket"]["rounds"] if r["asked"] == asked)


def _of_control(result: dict[str, Any], name: str) -> float:
    return result[name]["accuracy"]


def _ticket(seed: int, folder: Path, size: Size) -> dict[str, Any]:
    found = _rounds(seed, folder, size)
    facts = [{"asked": r.asked, "sparsity": r.sparsity, **r.metrics} for r in found]
    return {"rounds": facts, "data": DATA}


def _rounds(seed: int, folder: Path, size: Size) -> list[Round]:
    """The rounds of iterative pruning, trained or read."""
    task = _task(folder.parent / "data.npz")
    return secateur.iterate(
        seeded(ResidualMLP, seed), folder / "rounds", make_optimizer=_adam, make_data=lambda _: _cycle(task, size.steps),
        train=updates, evaluate=task.metrics, epochs=1, sparsities=size.sparsities, rewind="init", allocation="uniform",
        seed=seed,
    )  # fmt: skip


def _random(seed: int, folder: Path, size: Size, sparsity: float) -> dict[str, Any]:
    """The initial weights under masks drawn at random."""
    model = seeded(ResidualMLP, seed)
    secateur.prune(model, sparsity, criterion=secateur.random(seed), allocation="uniform")
    return _trained(model, secateur.masks(model), folder, size)


def _random_with_biases(seed: int, folder: Path, size: Size, sparsity: float) -> dict[str, Any]:
    """The published control: random masks over weights and biases of a layer, pooled."""
    model, draw = seeded(ResidualMLP, seed), torch.Generator().manual_seed(seed)
    masks = {}
    for name, layer in model.named_children():
        weights, biases = layer.weight.numel(), layer.bias.numel()
        keep = torch.randperm(weights + biases, generator=draw) >= int(sparsity * (weights + biases))
        masks[f"{name}.weight"] = keep[:weights].view(layer.weight.shape).to(layer.weight.device)
        _hold_at_zero(layer.bias, ~keep[weights:].to(layer.bias.device))
    return _trained(model, masks, folder, size)


def _hold_at_zero(bias: nn.Parameter, where: Tensor) -> None:
    """Biases are not pruned by magnitude here, so no `secateur.Pruner` holds them."""
    with torch.no_grad():
        bias.masked_fill_(where, 0)

    def zero(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(where, 0)

    bias.register_post_accumulate_grad_hook(zero)


def _reinit(seed: int, folder: Path, size: Size, sparsity: float) -> dict[str, Any]:
    """The ticket's masks over weights drawn anew."""
    ticket = next(r for r in _rounds(seed, folder, size) if r.asked == sparsity)
    model = seeded(ResidualMLP, seed + 1000)
    return _trained(model, ticket.masks(), folder, size)


def _trained(model: nn.Module, masks: dict[str, Tensor], folder: Path, size: Size) -> dict[str, Any]:
    task = _task(folder.parent / "data.npz")
    optimizer, _ = _adam(model)
    pruner = secateur.Pruner(model, optimizer, allocation="uniform")
    pruner.hold(masks)
    updates(Run(model, optimizer, None, pruner, 0, size.steps, lambda _: _cycle(task, size.steps), size.steps))
    return {"accuracy": task.accuracy(model), "sparsity": pruner.sparsity, "data": task.name}


def _adam(model: nn.Module) -> tuple[Optimizer, None]:
    return Adam(model.parameters(), lr=0.02, fused=True), None


def _cycle(task: Task, steps: int) -> Cycle:
    return Cycle(list(zip(task.inputs.split(task.batch), task.labels.split(task.batch), strict=True)), steps)


@lru_cache(1)
def _task(path: Path) -> Task:
    """The published data, 4,000 to train on and 1,000 to score, generated once and kept beside the seeds."""
    if not path.exists():
        _generate(path)
    with np.load(path) as found:
        x, y, x_test, y_test = (torch.from_numpy(found[k]) for k in ("x", "y", "x_test", "y_test"))
    device = current().device
    x, y, x_test, y_test = (t.to(device) for t in (x.float(), y, x_test.float(), y_test))
    return Task(DATA, x, y, (x_test, y_test), 100)


def _generate(path: Path) -> None:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as e:
        raise ModuleNotFoundError(
            f"MNIST-1D is generated by a package that is not here, or lacks a package of its own ({e}): {INSTALL}"
        ) from e
    made = make_dataset(get_dataset_args())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.npz")
    np.savez(part, **{k: made[k] for k in ("x", "y", "x_test", "y_test")})
    part.replace(path)
