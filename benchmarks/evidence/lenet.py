"""LeNet-300-100: how far it can be compressed at a dense network's budget, and whether its tickets win.

Compression counts weights: 12 times is one weight in twelve kept. The method that the bars are about was chosen before anything
was scored: gradual pruning, global, in one run of as many epochs as the dense network it is paired with, with the same optimizer,
learning rate and order of the data. Iterative pruning with learning-rate rewinding is shown beside it; each of its rounds
trains for a quarter of that, all of them together for five times as long.

Tickets are those of Frankle and Carbin (arXiv:1803.03635): a fifth of what is left goes in each round, in the output layer a
tenth; survivors return to their initial weights. The control keeps a ticket's masks and draws the weights anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer

import secateur
from benchmarks.evidence.common import (
    EVERYTHING,
    Task,
    cells,
    data_of,
    fit,
    high,
    linear_rate,
    paired,
    pictures_for,
    scored,
    seeded,
    seeds_of,
    shown,
    updates,
)  # fmt: skip
from benchmarks.result import Bar, Table
from examples.life.nets import lenet
from secateur.evaluate.statistics import interval
from secateur.train.rounds import Round

NAME = "lenet"
TITLE = "LeNet-300-100: compression and lottery tickets"
SEEDS = (0, 1, 2, 3, 4)

TIMES = (12, 56)
RATE = 1.2e-3
MOST_MORE = {"Fashion-MNIST": {12: 0.5}, "MNIST-5k": {}}
"""Points of error that compression may add, by data; the interval must end below ``MOST_HIGH``."""
MOST_MORE_PUBLISHED = {12: 0.1, 56: 0.4}
"""The same on MNIST, from Han et al. (arXiv:1506.02626) and dynamic network surgery (arXiv:1608.04493)."""
MOST_HIGH = 1.0


@dataclass(frozen=True)
class Size:
    """How much is trained: epochs of the dense network and of gradual pruning, and of each round; rounds of the two tickets."""

    train: int = EVERYTHING
    batch: int = 128
    epochs: int = 30
    scored: int = 10_000
    round_epochs: int = 8
    tickets: tuple[int, int] = (7, 15)
    rewound: tuple[float, ...] = (
        *(1 - 0.8**r for r in range(1, 11)), 1 - 1 / 12, *(1 - 0.8**r for r in range(12, 18)), 1 - 1 / 56,
    )  # fmt: skip


FULL, QUICK = Size(), Size(500, 64, 2, 1000, 1, (1, 2), (1 - 1 / 12, 1 - 1 / 56))


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, a seed's dense network, its compressed ones, its tickets and their controls."""
    size = QUICK if quick else FULL
    makers = {"dense": partial(_dense, seed, size)}
    makers |= {f"gradual-{times}": partial(_gradual, seed, size, times) for times in TIMES}
    makers |= {"rewound": partial(_rewound, seed, folder, size), "ticket": partial(_ticket, seed, folder, size)}
    makers |= {f"reinit-{number}": partial(_reinit, seed, folder, size, number) for number in size.tickets}
    return cells(folder, makers, asdict(size))


def summary(results: list[dict[str, Any]]) -> tuple[list[Table], list[Bar]]:
    """Errors, and the differences of each seed."""
    data = data_of(results)
    seeds = f"{data}, {seeds_of(results)}"
    return [_compression_table(seeds, results), _ticket_table(seeds, results)], _bars(data, results)


def _error(result: dict[str, Any], name: str, asked: float | None = None, number: int | None = None) -> float:
    """Percent of the test part that a cell's network gets wrong, or that of one of its rounds."""
    found = result[name]
    if asked is not None or number is not None:
        found = next(r for r in found["rounds"] if number == r["number"] or asked == r["asked"])
    return 100 - found["accuracy"]


def _compression_table(seeds: str, results: list[dict[str, Any]]) -> Table:
    dense = partial(_error, name="dense")
    rows = [("dense", "100 %", shown(interval([dense(r) for r in results])), "")]
    for times in TIMES:
        ways = {
            "gradual": partial(_error, name=f"gradual-{times}"),
            "iterative, rate rewound": partial(_error, name="rewound", asked=1 - 1 / times),
        }
        for way, error in ways.items():
            rows.append((
                f"{way}, {times}×", f"{1 / times:.1%}", shown(interval([error(r) for r in results])),
                shown(paired(results, error, dense), sign=True),
            ))  # fmt: skip
    title = f"{seeds}: error after the last step, %, mean ± half of the 95 % interval; differences in points, paired by seed"
    return Table(title, ("<", "weights kept", "error", "more than dense"), rows)


def _ticket_table(seeds: str, results: list[dict[str, Any]]) -> Table:
    rows = []
    dense = partial(_error, name="ticket", number=0)
    for r in results[0]["ticket"]["rounds"]:
        number = r["number"]
        ticket, anew = partial(_error, name="ticket", number=number), partial(_error, name=f"reinit-{number}")
        control = f"reinit-{number}" in results[0]
        rows.append((
            f"{1 - r['sparsity']:.1%}", shown(interval([ticket(x) for x in results])),
            shown(paired(results, ticket, dense), sign=True) if number else "",
            shown(interval([anew(x) for x in results])) if control else "",
            shown(paired(results, anew, ticket), sign=True) if control else "",
        ))  # fmt: skip
    title = f"{seeds}: error of tickets, %, each trained for as long as the dense network of the first row; differences paired"
    heads = ("weights kept", "ticket", "more than dense", "weights drawn anew", "more than the ticket")
    return Table(title, heads, rows)


def _bars(data: str, results: list[dict[str, Any]]) -> list[Bar]:
    bars = []
    for times, most in MOST_MORE.get(data, MOST_MORE_PUBLISHED).items():
        more = paired(results, partial(_error, name=f"gradual-{times}"), partial(_error, name="dense"))
        bars.append(Bar(f"{times}×, gradual: more error than dense, points", more.mean, most))
        if data == "Fashion-MNIST":
            bars.append(Bar(f"{times}×, gradual: upper end of its interval, points", high(more), MOST_HIGH))
    return bars


# What is trained


def _task(seed: int, size: Size) -> Task:
    return pictures_for(seed, size.train, size.batch, size.scored)


def _dense(seed: int, size: Size) -> dict[str, Any]:
    task, model = _task(seed, size), seeded(lenet, seed)
    steps = size.epochs * task.steps
    fit(model, task, seed, steps, _to_zero(model, steps))
    return scored(model, task)


def _gradual(seed: int, size: Size, times: int) -> dict[str, Any]:
    task, model = _task(seed, size), seeded(lenet, seed)
    steps = size.epochs * task.steps
    made = _to_zero(model, steps)
    pruner = secateur.Pruner(model, made[0], secateur.schedules.auto(1 - 1 / times, steps))
    fit(model, task, seed, steps, made, pruner)
    return scored(model, task)


def _to_zero(model: nn.Module, steps: int) -> tuple[Optimizer, Any]:
    optimizer = Adam(model.parameters(), lr=RATE, fused=True)
    return optimizer, linear_rate(optimizer, steps)


def _rewound(seed: int, folder: Path, size: Size) -> dict[str, Any]:
    task = _task(seed, size)
    found = secateur.iterate(
        seeded(lenet, seed), folder / "rewound", make_optimizer=partial(_to_zero, steps=size.round_epochs * task.steps),
        make_data=task.epoch, train=updates, evaluate=task.metrics, epochs=size.round_epochs, sparsities=size.rewound,
        rewind="lr", seed=seed,
    )  # fmt: skip
    return _told(found, task)


def _ticket(seed: int, folder: Path, size: Size) -> dict[str, Any]:
    return _told(_tickets(seed, folder, size), _task(seed, size))


def _tickets(seed: int, folder: Path, size: Size) -> list[Round]:
    """The rounds that find the tickets, trained or read."""
    task = _task(seed, size)
    return secateur.iterate(
        seeded(lenet, seed), folder / "tickets", make_optimizer=_constant, make_data=task.epoch, train=updates,
        evaluate=task.metrics, epochs=size.round_epochs, rounds=max(size.tickets), rate={"fc3": 0.1, "*": 0.2},
        rewind="init", seed=seed,
    )  # fmt: skip


def _reinit(seed: int, folder: Path, size: Size, number: int) -> dict[str, Any]:
    """A ticket's masks over weights drawn anew."""
    ticket, task = _tickets(seed, folder, size)[number], _task(seed, size)
    model = seeded(lenet, seed + 1000)
    made = _constant(model)
    pruner = secateur.Pruner(model, made[0])
    pruner.hold(ticket.masks())
    fit(model, task, seed, size.round_epochs * task.steps, made, pruner)
    return scored(model, task)


def _constant(model: nn.Module) -> tuple[Optimizer, None]:
    """The rate of the paper."""
    return Adam(model.parameters(), lr=RATE, fused=True), None


def _told(rounds: Sequence[Round], task: Task) -> dict[str, Any]:
    facts = [{"number": r.number, "asked": r.asked, "sparsity": r.sparsity, **r.metrics} for r in rounds]
    return {"rounds": facts, "data": task.name}
