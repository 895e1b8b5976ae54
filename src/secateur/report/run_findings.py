"""What a run's numbers say, in sentences: the method ahead at each sparsity, against dense and against the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.evaluate.statistics import Interval

from .run_facts import DENSE, Metric, RunFacts, methods, sparsities
from .words import MINUS, join, signed

MOST_LISTED = 6
"""Sparsities a sentence lists one by one."""


@dataclass(frozen=True)
class Best:
    """The method ahead at one sparsity.

    Attributes:
        asked: the sparsity.
        method, value: who has the best mean, and the mean.
        minus_dense: against dense, seed by seed; ``None`` where there is nothing to pair.
        second, minus_second: the next method and the difference from it; ``None`` where there is no other.
        epochs, second_epochs: training that was spent on the two.
    """

    asked: float
    method: str
    value: Interval
    minus_dense: Interval | None
    second: str | None
    minus_second: Interval | None
    epochs: float
    second_epochs: float

    @property
    def clear(self) -> bool:
        """Whether the next method is told apart from it."""
        return self.minus_second is not None and self.minus_second.excludes_zero

    @property
    def single(self) -> bool:
        """Whether there is no more than one seed to go by, so that nothing is told apart."""
        return self.value.n == 1 or (self.minus_second is not None and self.minus_second.n == 1)


def find_best(run: RunFacts, metric: Metric) -> list[Best]:
    """The best method at each sparsity that has a finite value."""
    epochs = {(c.method, c.asked): c.epochs for c in run.cells}
    found = []
    for asked in sparsities(run):
        order = metric.ranked(methods(run), asked)
        if not order:
            continue
        first, second = order[0], order[1] if len(order) > 1 else None
        value = metric.mean(first, asked)
        assert value is not None
        found.append(
            Best(
                asked=asked,
                method=first,
                value=value,
                minus_dense=metric.minus((first, asked), (DENSE, 0.0)),
                second=second,
                minus_second=None if second is None else metric.minus((first, asked), (second, asked)),
                epochs=epochs[first, asked],
                second_epochs=0.0 if second is None else epochs[second, asked],
            )
        )
    return found


def headline(best: Sequence[Best], metric: Metric | None) -> str:
    """The page's answer, in a sentence or two.

    >>> headline([], None)
    'No pruned network was measured.'
    """
    if not best or metric is None:
        return "No pruned network was measured."
    if all(b.second is None for b in best):
        return _alone(best)
    if all(b.single for b in best):
        return f"One seed tells no difference apart. The best {metric.name} in it: {_grouped(best)}."
    clear = [b for b in best if b.clear]
    unclear = [b for b in best if not b.clear and b.second is not None]
    if not clear:
        return (
            f"The best method is not told apart from the next at any sparsity. The best mean {metric.name}: "
            f"{_grouped(unclear)}."
        )
    said = f"Best {metric.name}: {_grouped(clear)}."
    if unclear:
        said += f" At {_listed([b.asked for b in unclear])} the best two are not told apart."
    return said


def _alone(best: Sequence[Best]) -> str:
    """One method has nothing but dense to be held against."""
    name = join(sorted({b.method for b in best}))
    if all(b.single for b in best):
        return f"{name} was not compared with another method, and one seed tells no difference from dense."
    apart = [b.asked for b in best if b.minus_dense is not None and b.minus_dense.excludes_zero]
    if not apart:
        return f"{name} is not told apart from dense at any sparsity. No other method was tried."
    return f"{name} is told apart from dense at {_listed(apart)}. No other method was tried."


def sentence(b: Best, metric: Metric) -> str:
    """One sparsity's answer with its numbers."""
    rank = "has the only value" if b.second is None else "has the best value" if b.single else "has the best mean"
    if b.clear:
        rank = "is best"
    said = [f"{metric.name} {written(b.value, metric)}"]
    if b.minus_dense is not None:
        said.append(_against(b.minus_dense, DENSE, metric))
    if b.second is not None and b.minus_second is not None:
        said.append(_against(b.minus_second, "the next", metric, f"{b.second}: "))
    ending = "; one seed tells no difference apart" if b.single else ""
    if b.second is not None and b.epochs != b.second_epochs:
        ending += f"; {b.method} was trained for {b.epochs:g} epochs, {b.second} for {b.second_epochs:g}"
    return f"{b.method} {rank}: {', '.join(said)}{ending}."


def _against(difference: Interval, other: str, metric: Metric, who: str = "") -> str:
    """A paired difference: where it leads, or that it does not tell the two apart; ``who`` goes before the numbers."""
    shown = f"{written_difference(difference, metric)}{metric.points}"
    if difference.half is not None and not difference.excludes_zero:
        return f"not told apart from {other} ({who}{shown})"
    named = f"{other} ({who.removesuffix(': ')})" if who else other
    if round(difference.mean, metric.digits) == 0 and difference.half is None:
        return f"level with {named}"
    way = "above" if difference.mean > 0 else "below"
    return f"{shown.lstrip('+' + MINUS)} {way} {named}"


def written(value: Interval | None, metric: Metric) -> str:
    """A mean with its interval.

    >>> written(Interval(97.125, 0.4, 3), Metric("accuracy", "%", 1, 1, {})), written(None, Metric("f1", "", 1, 3, {}))
    ('97.1 ± 0.4%', 'n/a')
    """
    if value is None:
        return "n/a"
    half = "" if value.half is None else f" ± {value.half:.{metric.digits}f}"
    return f"{value.mean:.{metric.digits}f}{half}{metric.unit}"


def written_difference(value: Interval | None, metric: Metric) -> str:
    """A difference with its sign and its interval.

    >>> written_difference(Interval(0.12, 0.03, 3), Metric("accuracy", "%", 1, 2, {}))
    '+0.12 ± 0.03'
    """
    if value is None:
        return "n/a"
    half = "" if value.half is None else f" ± {value.half:.{metric.digits}f}"
    return f"{signed(value.mean, metric.digits)}{half}"


def percent(sparsity: float) -> str:
    """A sparsity as it was asked.

    >>> percent(0.9), percent(0.985), percent(0.29)
    ('90%', '98.5%', '29%')
    """
    return f"{round(100 * sparsity, 10):g}%"


def _grouped(best: Sequence[Best]) -> str:
    """Who is ahead where, in the order of the sparsities."""
    where: dict[str, list[float]] = {}
    for b in best:
        where.setdefault(b.method, []).append(b.asked)
    return "; ".join(f"{method} at {_listed(at)}" for method, at in where.items())


def _listed(asked: Sequence[float]) -> str:
    if len(asked) > MOST_LISTED:
        return f"{len(asked)} sparsities between {percent(asked[0])} and {percent(asked[-1])}"
    return join([percent(a) for a in asked])
