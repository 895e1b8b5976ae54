"""Channels of a plain convolutional network, by seven criteria: the first half of the study ``structures``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur
from benchmarks.evidence.cnn import sgd
from benchmarks.evidence.common import (
    Task,
    cells,
    data_of,
    drawn,
    fit,
    paired,
    pictures_for,
    seeded,
    seeds_of,
    shown,
    trained_once,
)  # fmt: skip
from benchmarks.result import Table
from secateur.evaluate.norms import silence_norms
from secateur.evaluate.statistics import interval

AMOUNTS = ("0.3", "0.5")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("magnitude, l1", {"pattern": secateur.Channel("out", reduce="l1")}),
    "l2": ("magnitude, l2", {"pattern": secateur.Channel("out", reduce="l2")}),
    "scale": ("BatchNorm scale", {"criterion": "batchnorm_scale"}),
    "activation": ("mean activation", {"criterion": "mean_activation"}),
    "apoz": ("APoZ", {"criterion": "apoz"}),
    "taylor": ("Taylor", {"criterion": "taylor_channel"}),
    "random": ("random", {}),
}
"""The title of each, and what `secateur.prune` is asked beside the rest."""
MEASURED = ("scale", "activation", "apoz", "taylor")
WHEN = ("at once", "tuned")
PARTS = {
    "the first five": {"own": slice(0, 5)},
    "the last": {"own": slice(5, 6)},
    "all six, the last at random": {"own": slice(0, 5), "random": slice(5, 6)},
}
"""Which convolutions lose channels by a criterion, and which at random: to see where the damage comes from. Looked at after
the accuracies were known."""
DENSE, BY_PART = "channels-dense", "channels-by-part"

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Size:
    """How much is trained and read.

    Attributes:
        train, batch: pictures to train on, and of a batch.
        epochs, tuned: of the dense network, and of each network that is tuned.
        seen, each: training pictures that criteria look at, and of a batch of them.
        renewed: batches by which statistics of BatchNorm are measured again.
        scored: test pictures.
    """

    train: int = 20_000
    batch: int = 128
    epochs: int = 10
    tuned: int = 2
    seen: int = 2048
    each: int = 32
    renewed: int = 50
    scored: int = 10_000


FULL, QUICK = Size(), Size(200, 50, 2, 1, 40, 20, 2, 500)


class Plain(nn.Module):
    """Six 3x3 convolutions, each with BatchNorm and ReLU behind it, for 28x28 pictures: 112,180 weights in them.

    Widths are multiples of ten, so that 30 % of a layer's channels is a whole number of them.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for i, width in enumerate((20, 20, 40, 40, 80, 80)):
            if i in (2, 4):
                layers.append(nn.MaxPool2d(2))
            conv = nn.Conv2d(inputs, width, 3, 1 if i else 2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures ``(n, 1, 28, 28)`` to logits ``(n, 10)``."""
        return self.fc(self.features(x).mean((2, 3)))

    def behind(self) -> dict[str, str]:
        """The convolutions, and the norm behind each, by name."""
        names = [n for n, m in self.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        return dict(zip(names[::2], names[1::2], strict=True))


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, a seed's dense network and what every criterion leaves of it."""
    size = QUICK if quick else FULL
    makers: dict[str, Callable[[], dict[str, Any]]] = {DENSE: partial(_dense, seed, folder, size)}
    for amount in AMOUNTS:
        for method in METHODS:
            makers[name_of(method, amount)] = partial(_pruned, seed, folder, size, method, amount)
    makers[BY_PART] = partial(_by_part, seed, folder, size)
    return cells(folder, makers, asdict(size))


def name_of(method: str, amount: str) -> str:
    """Of the cell of a criterion at an amount."""
    return f"channels-{method}-{amount}"


# What is made


def _task(seed: int, size: Size) -> Task:
    return pictures_for(seed, size.train, size.batch, size.scored)


def _started(seed: int, folder: Path, size: Size) -> Plain:
    """The dense network of a seed. Channels last in memory: a third faster here."""
    task = _task(seed, size)
    model = seeded(Plain, seed).to(memory_format=torch.channels_last)
    assert isinstance(model, Plain)
    steps = size.epochs * task.steps
    trained_once(folder / "channels.safetensors", model, lambda: fit(model, task, seed, steps, sgd(model, steps)))
    return model


def _dense(seed: int, folder: Path, size: Size) -> dict[str, Any]:
    """The dense network, and the same after the updates that the others are tuned with."""
    return _scored(_started(seed, folder, size), _task(seed, size), seed, size)


def _pruned(seed: int, folder: Path, size: Size, method: str, amount: str) -> dict[str, Any]:
    task, model = _task(seed, size), _started(seed, folder, size)
    _prune(model, task, seed, size, method, amount, list(model.behind()))
    return _scored(model, task, seed, size)


def _by_part(seed: int, folder: Path, size: Size) -> dict[str, Any]:
    """Accuracies at once where only some of the convolutions lose channels, and of the class with the lowest."""
    task = _task(seed, size)
    found: dict[str, Any] = {
        "data": task.name,
        "dense": dict.fromkeys(PARTS, _lowest(_started(seed, folder, size), task)),
    }
    for method in METHODS:
        found[method] = {}
        for part, chosen in PARTS.items():
            model = _started(seed, folder, size)
            for how, which in chosen.items():
                by = method if how == "own" else how
                _prune(model, task, seed, size, by, AMOUNTS[0], list(model.behind())[which])
            found[method][part] = _lowest(model, task)
    return found


def _lowest(model: Plain, task: Task) -> dict[str, Any]:
    """The accuracy on the test part, and on the class of it with the lowest."""
    x, y = task.test
    each = [replace(task, test=(x[y == c], y[y == c])).accuracy(model) for c in y.unique()]
    return {"accuracy": task.accuracy(model), "worst class": {"accuracy": min(each)}}


def _prune(
    model: Plain, task: Task, seed: int, size: Size, method: str, amount: str, convolutions: Sequence[str]
) -> None:
    """Prunes channels of some convolutions, silences the norms behind them and measures the statistics of all again."""
    asked = {"pattern": "channel", **METHODS[method][1]}
    if method == "random":
        asked["criterion"] = secateur.random(seed)
    if method in MEASURED:
        batches = drawn(task, seed, size.seen, size.each)
        asked["calibration"] = secateur.Calibration(batches, loss=_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", secateur.SecateurWarning)  # norms that fire: silenced in the next line
        secateur.prune(model, float(amount), include=convolutions, allocation="uniform", **asked)
    silence_norms(model)
    secateur.recalibrate_batchnorm(model, drawn(task, seed, size.renewed * size.batch, size.batch))


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _scored(model: Plain, task: Task, seed: int, size: Size) -> dict[str, Any]:
    """The accuracy of a network as it is, and after tuning, with the channels of each layer that are gone in the end."""
    found: dict[str, Any] = {"data": task.name, "at once": {"accuracy": task.accuracy(model)}}
    _tune(model, task, seed, size)
    found["tuned"] = {"accuracy": task.accuracy(model)}
    found["gone"] = {conv: int(_silent(model, conv, norm).sum()) for conv, norm in model.behind().items()}
    return found


def _tune(model: Plain, task: Task, seed: int, size: Size) -> None:
    """The last epochs of the dense network's learning rates again; what is zero stays zero, in norms too."""
    steps, more = size.epochs * task.steps, size.tuned * task.steps
    made = sgd(model, steps, first=steps - more)
    factors = [f"{norm}.{name}" for norm in model.behind().values() for name in ("weight", "bias")]
    fit(model, task, seed, more, made, secateur.Pruner(model, made[0], include=["features", *factors]))


def _silent(model: Plain, conv: str, norm: str) -> Tensor:
    """Which channels of a layer are gone: zero in its filters, in the norm's factors and in its shifts."""
    filters, behind = model.get_submodule(conv).weight, model.get_submodule(norm)
    return (filters == 0).flatten(1).all(1) & (behind.weight == 0) & (behind.bias == 0)


# What is told


def tables(results: Results) -> list[Table]:
    """Accuracies, and differences from magnitude and from random channels of the same seed."""
    found = [{n: c for n, c in r.items() if n.startswith("channels-")} for r in results]
    columns = [(amount, when) for amount in AMOUNTS for when in WHEN]
    heads = ("<", *(f"{float(amount):.0%}, {when}" for amount, when in columns))
    rows = [("dense", *(shown(interval([_accuracy(r, DENSE, when) for r in found])) for _, when in columns))]
    for method, (title, _) in METHODS.items():
        values = ([_accuracy(r, name_of(method, amount), when) for r in found] for amount, when in columns)
        rows.append((title, *(shown(interval(v)) for v in values)))
    title = f"{data_of(found)}, {seeds_of(found)}: accuracy without channels, %, mean ± half of the 95 % interval"
    return [
        Table(title, heads, rows),
        Table("Above magnitude, l1, points, paired by seed", heads, _above(found, "l1", columns)),
        Table("Above random channels, points, paired by seed", heads, _above(found, "random", columns)),
        _parts_table(found),
    ]


def _parts_table(found: Results) -> Table:
    rows = []
    for method, title in {"dense": "dense", **{m: title for m, (title, _) in METHODS.items()}}.items():
        row = [title]
        for part in PARTS:
            own, random = (partial(_of_part, method=m, part=part) for m in (method, "random"))
            above = "" if method in ("dense", "random") else shown(paired(found, own, random), sign=True)
            row += [shown(interval([own(r) for r in found])), above]
        worst = [r[BY_PART][method]["the last"]["worst class"]["accuracy"] for r in found]
        rows.append((*row, shown(interval(worst))))
    heads = ("<", *(head for part in PARTS for head in (part, "above random")), "the last: worst class")
    title = f"Where the loss at {float(AMOUNTS[0]):.0%} comes from: accuracy at once, %, with some convolutions pruned as named"
    return Table(title, heads, rows)


def _of_part(result: Mapping[str, Any], method: str, part: str) -> float:
    return float(result[BY_PART][method][part]["accuracy"])


def _accuracy(result: Mapping[str, Any], name: str, when: str) -> float:
    return float(result[name][when]["accuracy"])


def _above(found: Results, reference: str, columns: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    """A row for each of the other criteria."""
    rows = []
    for method, (title, _) in METHODS.items():
        if method != reference:
            differences = [
                paired(
                    found,
                    partial(_accuracy, name=name_of(method, amount), when=when),
                    partial(_accuracy, name=name_of(reference, amount), when=when),
                )
                for amount, when in columns
            ]
            rows.append((title, *(shown(d, sign=True) for d in differences)))
    return rows
