"""What a run of a recipe hands to its page, as plain data, and the means and paired differences drawn from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from secateur.evaluate.statistics import Interval, interval

from .words import printable

Name = TypeVar("Name")
DENSE = "dense"
"""The method of the network that was not pruned; its cells ask for 0."""


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity with one seed.

    Attributes:
        seed, method: which run; the method ``"dense"`` is the network before pruning, and asks for 0.
        asked, sparsity: what was asked, and what was counted in the end.
        metrics: name to value; the first is the headline one.
        epochs: epochs of training that were spent on it, the dense network's included.
        layers: name of each chosen tensor to its sparsity, in the order of the model; may be empty.
        parameters, nonzero: all parameters of this network, biases and norms too, and those that are not zero.
        flops, effective_flops: those of one example, all and without the products with a zero weight (`secateur.count_flops`).
        begins: digests of what it began with: ``"init"``, the weights as they were initialised; ``"dense"``, those of the
            trained dense network; ``"batch"``, the first batch of its training.
        control: ``"random"`` or ``"small dense"`` for what others are held against, else nothing.
        whole: whether every update that was asked for was made before it was scored, once, at the end.
        recipe: digest of the settings that cells must share to be compared: data, network, evaluation, training.

    What a run of an older version did not record is ``None`` or empty.
    """

    seed: int
    method: str
    asked: float
    sparsity: float
    metrics: Mapping[str, float]
    epochs: float
    layers: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    nonzero: int | None = None
    flops: int | None = None
    effective_flops: int | None = None
    begins: Mapping[str, str] = field(default_factory=dict)
    control: str = ""
    whole: bool | None = None
    recipe: str = ""


@dataclass(frozen=True)
class Cost:
    """What a cell took on the machine that made it.

    Attributes:
        seed, method, asked: which cell.
        dense, pruning, training: seconds: the training of the dense network it began with, the pruning in one shot, and its
            own training, in which every other pruning lies.
        peak: the most memory, in bytes, while it was pruned and trained: what tensors held on a GPU, otherwise what the process
            held; ``None`` where the system does not tell.
        jobs: processes that were at work beside each other.
    """

    seed: int
    method: str
    asked: float
    dense: float
    pruning: float
    training: float
    peak: int | None
    jobs: int

    @property
    def seconds(self) -> float:
        """All there is."""
        return self.dense + self.pruning + self.training


@dataclass(frozen=True)
class Log:
    """One training, a number a step in each list.

    Attributes:
        seed, method: which run.
        what: the sparsity it was for (``"0.9"``), or a stretch of a longer run (``"round 3"``); stretches follow each other.
        steps: updates done.
        loss: the training loss of each step.
        asked, found: the sparsity the schedule asked for after the step, and what was zero then.
    """

    seed: int
    method: str
    what: str
    steps: Sequence[int]
    loss: Sequence[float]
    asked: Sequence[float]
    found: Sequence[float]


@dataclass(frozen=True)
class RunFacts:
    """Everything the page of a run shows.

    Attributes:
        name, about: the run's title, and a sentence or two.
        recipe: the text of the recipe.
        cells, logs: what came out, and how the training went; methods are shown in the order of ``cells``.
        facts: machine, versions, date, time: what to whatever.
        notes: sentences to show, such as what was not rewound.
        percent: the metrics that are counted in per cent; their differences are points.
        lower_is_better: the metrics of which less is better.
    """

    name: str
    about: str
    recipe: str
    cells: Sequence[Cell]
    logs: Sequence[Log] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    percent: Sequence[str] = ()
    lower_is_better: Sequence[str] = ()


Scores = dict[tuple[str, float], dict[int, float]]
"""``(method, asked) -> {seed: value}``."""


@dataclass(frozen=True)
class Metric:
    """One metric over the whole run.

    Attributes:
        name: as the recipe calls it.
        unit: ``"%"`` or nothing; points: what its differences are counted in.
        sign: 1 where more is better, -1 where less is.
        digits: decimals that are shown.
        scores: its values that are finite.
    """

    name: str
    unit: str
    sign: int
    digits: int
    scores: Scores

    @property
    def points(self) -> str:
        """The unit of a difference, with a space before it."""
        return " points" if self.unit else ""

    def mean(self, method: str, asked: float) -> Interval | None:
        """Mean over the seeds there are; ``None`` where there are none."""
        found = self.scores.get((method, asked))
        return interval(list(found.values())) if found else None

    def minus(self, one: tuple[str, float], other: tuple[str, float]) -> Interval | None:
        """The mean of ``one`` minus ``other``, seed by seed; ``None`` where they have no seed in common."""
        a, b = self.scores.get(one, {}), self.scores.get(other, {})
        both = [a[seed] - b[seed] for seed in a if seed in b]
        return interval(both) if both else None

    def ranked(self, methods: Sequence[str], asked: float) -> list[str]:
        """The methods that have a value there, best mean first; equal ones in the order given."""
        means = {m: found.mean for m in methods if (found := self.mean(m, asked)) is not None}
        return sorted(means, key=lambda m: -self.sign * means[m])


def metrics(run: RunFacts) -> list[Metric]:
    """Every metric of a run, the headline one first."""
    found = []
    for name in in_order(n for c in run.cells for n in c.metrics):
        scores: Scores = {}
        for c in run.cells:
            if math.isfinite(c.metrics.get(name, math.nan)):
                scores.setdefault((c.method, c.asked), {})[c.seed] = c.metrics[name]
        largest = max((abs(v) for by_seed in scores.values() for v in by_seed.values()), default=0.0)
        unit = "%" if name in run.percent else ""
        sign = -1 if name in run.lower_is_better else 1
        found.append(Metric(name, unit, sign, 2 if largest >= 10 else 3 if largest >= 1 else 4, scores))
    return found


def methods(run: RunFacts) -> list[str]:
    """The methods that prune, in the order of the cells."""
    return in_order(c.method for c in run.cells if c.method != DENSE)


def sparsities(run: RunFacts) -> list[float]:
    """Every sparsity that was asked of a method, rising."""
    return sorted({c.asked for c in run.cells if c.method != DENSE})


def in_order(names: Iterable[Name]) -> list[Name]:
    """Each name once, where it comes first.

    >>> in_order(["b", "a", "b"])
    ['b', 'a']
    """
    return list(dict.fromkeys(names))


def most(*peaks: int | None) -> int | None:
    """The largest of those that are known.

    >>> most(None, 3, 2), most(None)
    (3, None)
    """
    return max((p for p in peaks if p is not None), default=None)


def safe(run: RunFacts) -> RunFacts:
    """The run with the control characters in its names escaped; the page itself escapes HTML."""
    cells = [
        replace(
            c,
            method=printable(c.method),
            metrics={printable(n): v for n, v in c.metrics.items()},
            layers={printable(n): v for n, v in c.layers.items()},
        )
        for c in run.cells
    ]
    return replace(
        run,
        name=printable(run.name),
        about=printable(run.about),
        recipe="\n".join(printable(line) for line in run.recipe.splitlines()),
        cells=cells,
        logs=[replace(log, method=printable(log.method), what=printable(log.what)) for log in run.logs],
        facts={printable(k): printable(v) for k, v in run.facts.items()},
        notes=[printable(n) for n in run.notes],
        percent=[printable(n) for n in run.percent],
        lower_is_better=[printable(n) for n in run.lower_is_better],
    )
