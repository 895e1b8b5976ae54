"""Who beats the baseline, where, by how much, and whether a reviewer would believe it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from secateur.errors import BadInput
from secateur.report.run_facts import DENSE, Cell, Cost, Metric, RunFacts, in_order, methods, metrics, most, safe
from secateur.report.run_files import read_run

from .compare_rules import ENOUGH, Case, Rule, check_all
from .statistics import Interval, holm, interval, p_value

Word = Literal["better", "worse", "no difference shown", "no verdict"]


@dataclass(frozen=True)
class Verdict:
    """A method against the baseline at one sparsity.

    Attributes:
        method, asked: which.
        word: ``"better"`` or ``"worse"`` where the 95 % interval leaves zero out, ``"no difference shown"`` where it does not,
            ``"no verdict"`` below five seeds in common.
        difference: the method's metric minus the baseline's, seed by seed; ``None`` where they have no seed in common.
        p: of Student's paired test; ``None`` without a verdict.
        holm: whether a difference that is shown stays so when all comparisons together may err once in twenty times.
    """

    method: str
    asked: float
    word: Word
    difference: Interval | None
    p: float | None = None
    holm: bool = False


@dataclass(frozen=True)
class Point:
    """A method at one sparsity: means over the seeds, ``None`` where nothing is known.

    Attributes:
        method, asked, seeds: which, and the seeds with a finite metric.
        value, minus_dense: the metric, and its difference from the dense network's, seed by seed.
        density: parameters that are not zero, as a share of the dense network's.
        work: FLOPs without the products with a zero weight, as a share of the dense network's.
        epochs: training that was spent on it.
        by_density, by_work: whether no other point is as good for less, and none better for as much.
        dense, pruning, training: seconds, as of `Cost`.
        peak: bytes, the largest of all seeds.
    """

    method: str
    asked: float
    seeds: tuple[int, ...]
    value: Interval | None
    minus_dense: Interval | None
    density: float | None
    work: float | None
    epochs: float
    by_density: bool = False
    by_work: bool = False
    dense: float | None = None
    pruning: float | None = None
    training: float | None = None
    peak: int | None = None

    @property
    def compression(self) -> float | None:
        """All parameters of the dense network by those that are not zero here."""
        return 1 / self.density if self.density else None

    @property
    def speedup(self) -> float | None:
        """FLOPs of the dense network by those that are left: theoretical, not a measurement."""
        return 1 / self.work if self.work else None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; printed, it is the text of the terminal.

    Attributes:
        baseline, metric: what the methods were held against, and by what.
        asked, seeds: the sparsities, and the seeds that were asked for.
        points: the dense network, then each method at each of its sparsities.
        verdicts: each method but the baseline at each of its sparsities.
        rules: ShrinkBench's rules, kept or broken.
        warnings: what deserves a look.
        jobs: most processes that were at work beside each other while times were taken; 0 where none were.
    """

    baseline: str
    metric: Metric
    asked: tuple[float, ...]
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    verdicts: tuple[Verdict, ...]
    rules: tuple[Rule, ...]
    warnings: tuple[str, ...]
    jobs: int

    @property
    def methods(self) -> list[str]:
        """The methods but dense, in the order of the cells."""
        return in_order(p.method for p in self.points if p.method != DENSE)

    @property
    def tested(self) -> int:
        """Comparisons that could have a verdict; Holm's correction is for so many."""
        return sum(v.p is not None for v in self.verdicts)

    def to_json(self) -> str:
        """Everything as JSON."""
        told = {
            "baseline": self.baseline, "metric": self.metric.name, "lower_is_better": self.metric.sign < 0,
            "sparsities": self.asked, "seeds": self.seeds, "tested": self.tested,
            "verdicts": [_plain(v) for v in self.verdicts], "points": [_plain(p) for p in self.points],
            "rules": [_plain(r) for r in self.rules], "warnings": self.warnings, "jobs": self.jobs,
        }  # fmt: skip
        return json.dumps(told, indent=1)

    def to_html(self, name: str = "A comparison", about: str = "", facts: Mapping[str, str] | None = None) -> str:
        """One HTML document that loads nothing; ``facts`` say how it was run."""
        from secateur.report.compare_page import render

        return render(self, name, about, facts or {})

    def __str__(self) -> str:
        from secateur.report.compare_text import as_text

        return as_text(self)


def compare(
    cells: Iterable[Cell] | str | os.PathLike[str],
    baseline: str | None = None,
    *,
    metric: str | None = None,
    seeds: Sequence[int] | None = None,
    costs: Iterable[Cost] = (),
    percent: Sequence[str] = (),
    lower_is_better: Sequence[str] = (),
) -> Comparison:
    """Holds every method against a baseline, seed by seed, by ShrinkBench's rules.

    At each sparsity ``d = mean(method - baseline)`` over the seeds they have in common, with Student's 95 % interval. From
    five seeds on there is a verdict; Holm's correction says which of them stay when all are counted.

    Args:
        cells: results of `secateur.recipe.run.run`; or the folder of a run, finished or not, which also tells the seeds, what
            the cells took, and what is said of metrics in the recipe; or its ``results.json``.
        baseline: the method to beat; without it, the one called ``magnitude``, or the first whose name begins so.
        metric: the headline one unless named.
        seeds: those that were asked for, others are left out; without it, those that are there.
        costs: what the cells took.
        percent: the metrics that are counted in per cent.
        lower_is_better: the metrics of which less is better.

    Returns:
        A `Comparison`.

    Raises:
        BadInput: no cells; no such baseline or metric; nothing to hold against the baseline; no finite value; a cell twice; cells
            of several recipes, which share no data, network, evaluation or training.

    Example:
        >>> from secateur.report.run_facts import Cell
        >>> found = [Cell(s, "dense", 0, 0, {"accuracy": 98 + s / 10}, 9) for s in range(5)]
        >>> found += [Cell(s, "magnitude", 0.9, 0.9, {"accuracy": 96 + s / 10}, 9) for s in range(5)]
        >>> found += [Cell(s, "new", 0.9, 0.9, {"accuracy": 97 + s / 10 + s % 2 / 20}, 9) for s in range(5)]
        >>> comparison = compare(found, percent=["accuracy"])
        >>> for v in comparison.verdicts:
        ...     print(v.method, v.asked, v.word, round(v.difference.mean, 3), round(v.difference.half, 3), v.holm)
        new 0.9 better 1.02 0.034 True

    Reference:
        Blalock et al., What is the State of Neural Network Pruning?, MLSys 2020, arXiv:2003.03033: the rules. It shows standard
        deviations over three seeds; paired differences, intervals and the bar of five seeds are ours.
    """
    if isinstance(cells, str | os.PathLike):
        found = read_run(Path(cells))
        told = found.settings.get("compare") or {}
        scored = found.settings.get("evaluate") is None and "data" in found.settings  # by the recipes' own accuracy
        return compare(
            found.cells, baseline or told.get("baseline"), metric=metric or told.get("metric"),
            seeds=seeds or found.settings.get("seeds"), costs=found.costs, percent=[*percent, *(["accuracy"] if scored else [])],
            lower_is_better=[*lower_is_better, *found.settings.get("lower_is_better", [])],
        )  # fmt: skip
    given = list(cells)
    asked_seeds = tuple(in_order(seeds if seeds is not None else sorted({c.seed for c in given})))
    given = [c for c in given if c.seed in asked_seeds]
    run = safe(RunFacts("", "", "", given, percent=list(percent), lower_is_better=list(lower_is_better)))
    _check_cells(run.cells)
    against, chosen = baseline_of(methods(run), baseline), _metric(run, metric)
    case = Case(run.cells, against, chosen, asked_seeds)
    spent = list(costs)
    return Comparison(
        against, chosen, tuple(case.asked), asked_seeds, _points(case, spent), _verdicts(case), check_all(case),
        tuple(_warnings(run, case)), max((c.jobs for c in spent), default=0),
    )  # fmt: skip


def _check_cells(cells: Sequence[Cell]) -> None:
    if not cells:
        raise BadInput("there are no cells to compare, or none of the seeds that were asked for.")
    keys = [(c.seed, c.method, c.asked) for c in cells]
    if len({*keys}) < len(keys):
        seed, method, asked = next(k for k in keys if keys.count(k) > 1)
        raise BadInput(f"{method!r} at {asked:g} with seed {seed} is there twice: give the cells of one run.")
    recipes = in_order(c.recipe for c in cells if c.recipe)
    if len(recipes) > 1:
        one, other = (next(c for c in cells if c.recipe == r) for r in recipes[:2])
        raise BadInput(
            f"these cells are of {len(recipes)} recipes, whose data, network, evaluation or training differ ({one.method!r} "
            f"of one, {other.method!r} of another): compare within one."
        )


def baseline_of(there: Sequence[str], named: str | None) -> str:
    """The method that the others of ``there`` are held against.

    Raises:
        BadInput: it is not there, or nothing but it.
    """
    magnitude = [m for m in there if m.startswith("magnitude")]
    found = named if named is not None else "magnitude" if "magnitude" in there else next(iter(magnitude), None)
    if found is None or found not in there:
        what = "no method's name begins with 'magnitude'" if named is None else f"{named!r} is none of the methods"
        raise BadInput(f"{what}: name the baseline, one of {', '.join(map(repr, there)) or 'none, since none prunes'}.")
    if len(there) == 1:
        raise BadInput(f"there is no method but {found!r}: a comparison needs another.")
    return found


def _metric(run: RunFacts, named: str | None) -> Metric:
    there = metrics(run)
    if not there:
        raise BadInput("these cells hold no metric.")
    found = there[0] if named is None else next((m for m in there if m.name == named), None)
    if found is None:
        raise BadInput(f"{named!r} is no metric of these cells: there are {', '.join(m.name for m in there)}.")
    if not found.scores:
        raise BadInput(f"no cell has a finite {found.name}.")
    return found


def _verdicts(case: Case) -> tuple[Verdict, ...]:
    """One for each method but the baseline at each of its sparsities."""
    found = [_verdict(case, key) for key in case.pruned if key[0] != case.baseline]
    tested = [i for i, v in enumerate(found) if v.p is not None]
    for i, kept in zip(tested, holm([v.p for v in found if v.p is not None]), strict=True):
        found[i] = replace(found[i], holm=kept)
    return tuple(found)


def _verdict(case: Case, key: tuple[str, float]) -> Verdict:
    pairs = case.pairs(key, (case.baseline, key[1]))
    difference = interval(pairs) if pairs else None
    if difference is None or len(pairs) < ENOUGH:
        return Verdict(*key, "no verdict", difference)
    word: Word = "no difference shown"
    if difference.excludes_zero:
        word = "better" if difference.mean * case.metric.sign > 0 else "worse"
    return Verdict(*key, word, difference, p_value(pairs))


def _points(case: Case, costs: Sequence[Cost]) -> tuple[Point, ...]:
    keys = [*([(DENSE, 0.0)] if (DENSE, 0.0) in case.at else []), *case.pruned]
    found = [_point(case, key, [c for c in costs if (c.method, c.asked) == key]) for key in keys]
    return tuple(
        replace(p, by_density=size, by_work=work)
        for p, size, work in zip(
            found, _front(found, case.metric.sign, "density"), _front(found, case.metric.sign, "work"), strict=True
        )
    )


def _point(case: Case, key: tuple[str, float], costs: Sequence[Cost]) -> Point:
    metric, cells = case.metric, case.at[key]
    dense = {c.seed: c for c in case.at.get((DENSE, 0.0), [])}
    beside = [(c, dense.get(c.seed)) for c in cells]
    seconds = {k: interval([getattr(c, k) for c in costs]).mean for k in ("dense", "pruning", "training") if costs}
    return Point(
        key[0], key[1], tuple(metric.scores.get(key, {})), metric.mean(*key), metric.minus(key, (DENSE, 0.0)),
        _share([(c.nonzero, None if d is None else d.parameters) for c, d in beside]),
        _share([(c.effective_flops, None if d is None else d.flops) for c, d in beside]),
        interval([c.epochs for c in cells]).mean, False, False,
        seconds.get("dense"), seconds.get("pruning"), seconds.get("training"), most(*(c.peak for c in costs)),
    )  # fmt: skip


def _front(points: Sequence[Point], sign: int, cost: Literal["density", "work"]) -> list[bool]:
    """Which points are on the front of a cost; none of which the cost or the metric is not known."""
    known = {
        i: (paid, sign * p.value.mean)
        for i, p in enumerate(points)
        if (paid := getattr(p, cost)) is not None and p.value is not None
    }
    ahead = dict(zip(known, front(list(known.values())), strict=True))
    return [ahead.get(i, False) for i in range(len(points))]


def _share(pairs: Sequence[tuple[int | None, int | None]]) -> float | None:
    """The mean of a share over seeds; ``None`` where one is not known."""
    known = [a / b for a, b in pairs if a is not None and b]
    return interval(known).mean if known and len(known) == len(pairs) else None


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points ``(cost, gain)`` are on the Pareto front: no other has as much gain for less, or more for as much.

    >>> front([(1.0, 9.0), (0.5, 9.0), (0.2, 7.0), (0.3, 6.0)])
    [False, True, True, False]
    """
    return [not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points) for cost, gain in points]


def _warnings(run: RunFacts, case: Case) -> Iterable[str]:
    name = case.metric.name
    lost = sum(not math.isfinite(c.metrics.get(name, math.nan)) for c in run.cells)
    if lost:
        yield f"{lost} of {len(run.cells)} cells have no finite {name}; they are left out."
    if (DENSE, 0.0) in case.at:
        at = f"at the highest sparsity, {case.asked[-1]:.4g}"
        for metric in metrics(run):
            if metric.scores and not _moves(metric, case):
                yield (
                    f"{metric.name} does not move: {at}, it tells no method apart from dense. It may hide damage; look at "
                    "another metric, or prune further."
                )


def _moves(metric: Metric, case: Case) -> bool:
    """Whether a metric tells any method at the highest sparsity apart from dense."""
    last = [key for key in case.pruned if key[1] == case.asked[-1]]
    found = [d for key in last if (d := metric.minus(key, (DENSE, 0.0))) is not None]
    return any(d.mean != 0 if d.half is None else d.excludes_zero for d in found)


def _plain(what: Any) -> dict[str, Any]:
    return {k: vars(v) if isinstance(v, Interval) else v for k, v in vars(what).items()}
