"""What regularisation leaves of a network that is pruned once and not trained again, against its strength λ.

LeNet-300-100 on 9,000 pictures, Adam with a learning rate of 1.2e-3 that falls linearly to zero, 10 epochs; the weights of
the last step count. Every network of a seed begins with the same weights and sees the same batches. Then it is pruned
globally by magnitude to 80 %, and from there to 90 %, which is the same as 90 % at once.

A tenth of the training pictures is held out. They alone choose a λ where one is chosen; the test pictures are only scored.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur
from benchmarks.evidence.common import cells, current, data_of, seeds_of, shown
from benchmarks.result import Bar, Table
from examples.life.nets import lenet
from examples.life.pictures import Pictures, pictures
from secateur import regularize
from secateur.evaluate.statistics import interval

NAME = "regularize"
TITLE = "One-shot accuracy against the strength of regularisation"
SEEDS = (0, 1, 2)

LR = 1.2e-3
SPARSITIES = (0.8, 0.9)
NONE, BEST = "none", "L1, proximal"
METHODS: dict[str, tuple[Callable[[float], Any], tuple[float, ...]]] = {
    BEST: (regularize.l1, (0.01, 0.03, 0.1, 0.3)),
    "L1, penalty": (partial(regularize.l1, method="penalty"), (1e-5, 3e-5, 1e-4, 3e-4)),
    "weight decay": (regularize.weight_decay, (0.1, 0.3, 1.0, 3.0)),
    "group lasso": (regularize.group_lasso, (0.01, 0.03, 0.1, 0.3)),
}
"""What makes a regulariser from λ, and the λ tried, factors of 3 apart."""

Cell = dict[str, Any]


class Split:
    """Training pictures without those held out, the held out, and the test part."""

    def __init__(self, data: Pictures) -> None:
        out = torch.zeros(len(data.labels), dtype=torch.bool)
        for c in range(10):
            of_class = (data.labels == c).nonzero().flatten()
            out[of_class[: len(of_class) // 10]] = True  # they come in an order drawn from the seed
        self.train = Pictures(data.name, data.inputs[~out], data.labels[~out], data.test, data.batch)
        self.parts = {"held out": (data.inputs[out], data.labels[out]), "test": data.test}


@dataclass(frozen=True)
class Size:
    """How much is trained, and which λ are tried: all, or one of each method."""

    train: int = 10_000
    batch: int = 64
    epochs: int = 10
    all: bool = True


FULL, QUICK = Size(), Size(500, 64, 1, False)


def run_seed(seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Trains, or reads, every network of a seed."""
    size = QUICK if quick else FULL
    makers = {"none": partial(_cell, seed, size, NONE, 0.0)}
    for method, (_, strengths) in METHODS.items():
        for strength in strengths if size.all else strengths[2:3]:
            makers[f"{slug(method)}-{strength:g}"] = partial(_cell, seed, size, method, strength)
    return cells(folder, makers, asdict(size))


def slug(method: str) -> str:
    """A method's name in the name of a file."""
    return re.sub(r"\W+", "-", method)


def _cell(seed: int, size: Size, method: str, strength: float) -> Cell:
    split = Split(pictures(seed, size.train, size.batch, current().data))
    how = None if method == NONE else METHODS[method][0](strength)
    about = {"method": method, "strength": strength, "data": split.train.name, "pictures": len(split.train.labels)}
    return {**about, **_train(seed, split, how, size.epochs)}


def _train(seed: int, split: Split, how: Any, epochs: int) -> Cell:
    """Trains one network and prunes it."""
    torch.manual_seed(seed)
    model = lenet()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    if how is not None:
        regularize.attach(model, optimizer, how)
    steps = epochs * len(split.train.train(torch.Generator()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    for epoch in range(epochs):
        for x, y in split.train.train(torch.Generator().manual_seed(1000 * seed + epoch)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    channels = torch.cat([(w == 0).all(1) for w in weights])
    cell: Cell = {"zero": secateur.inspect(model).sparsity, "zero channels": float(channels.float().mean())}
    cell["0"] = {part: _accuracy(model, *given) for part, given in split.parts.items()}
    for sparsity in SPARSITIES:
        report = secateur.prune(model, sparsity)
        cell[f"{sparsity:g}"] = {part: _accuracy(model, *given) for part, given in split.parts.items()}
        cell[f"{sparsity:g}"]["sparsity"] = report.sparsity
    return cell


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Percent of the pictures that are told right."""
    return 100 * float((model(inputs).argmax(1) == labels).double().mean())


def summary(results: list[dict[str, Any]]) -> tuple[list[Table], list[Bar]]:
    """The whole curve, and what a λ chosen on the pictures held out gives; means and 95 % intervals over seeds."""
    by_key: dict[tuple[str, float], list[Cell]] = {}
    for result in results:
        for cell in result.values():
            by_key.setdefault((cell["method"], cell["strength"]), []).append(cell)
    rows = [
        (
            method, f"{strength:g}" if method != NONE else "", *(_percent(found, k) for k in ("zero", "zero channels")),
            *(shown(interval(_scores(found, s))) for s in ("0", *_names())),
        )
        for (method, strength), found in by_key.items()
    ]  # fmt: skip
    count = results[0]["none"]["pictures"]
    over = f"{data_of(results)}, {count:,} pictures, {seeds_of(results)}; mean ± half width of the 95 % interval"
    title = f"Test accuracy against λ, in %. {over}. What is sparser than asked is pruned no further."
    heads = ("<method", "λ", "weights zero, %", "channels zero, %", "dense", *(f"{s:.0%}" for s in SPARSITIES))
    chosen = {m: {s: _best(by_key, m, s) for s in _names()} for m in METHODS if any(k[0] == m for k in by_key)}
    pairs = [
        (method, *(text for s, key in keys.items() for text in (f"{key[1]:g}", *_against_none(by_key, key, s))))
        for method, keys in chosen.items()
    ]
    columns = [f"{s:.0%}: {what}" for s in SPARSITIES for what in ("λ", "accuracy", "over none")]
    picked = Table("λ by the pictures held out, and the same seeds without it, in %", ("<method", *columns), pairs)
    gains = interval(_gains(by_key, chosen[BEST]["0.9"], "0.9"))
    bar = Bar(
        "L1 by proximal step, one-shot at 90 %, over none: lower end of the interval",
        gains.mean - (gains.half or 0.0), 0.0, at_least=True, unit=" points",
    )  # fmt: skip
    return [Table(title, heads, rows), picked], [bar]


def _names() -> list[str]:
    return [f"{s:g}" for s in SPARSITIES]


def _scores(cells: Sequence[Cell], sparsity: str, part: str = "test") -> list[float]:
    return [c[sparsity][part] for c in cells]


def _gains(by_key: dict[tuple[str, float], list[Cell]], key: tuple[str, float], sparsity: str) -> list[float]:
    """Points of accuracy over the unregularised network of the same seed."""
    pairs = zip(_scores(by_key[key], sparsity), _scores(by_key[NONE, 0.0], sparsity), strict=True)
    return [a - b for a, b in pairs]


def _best(by_key: dict[tuple[str, float], list[Cell]], method: str, sparsity: str) -> tuple[str, float]:
    """The λ of a method with the best mean on the pictures held out."""
    keys = [k for k in by_key if k[0] == method]
    return max(keys, key=lambda k: statistics.fmean(_scores(by_key[k], sparsity, "held out")))


def _against_none(
    by_key: dict[tuple[str, float], list[Cell]], key: tuple[str, float], sparsity: str
) -> tuple[str, str]:
    gains = interval(_gains(by_key, key, sparsity))
    return shown(interval(_scores(by_key[key], sparsity))), shown(gains, sign=True)


def _percent(cells: Sequence[Cell], what: str) -> str:
    return f"{100 * statistics.fmean(c[what] for c in cells):.1f}"
