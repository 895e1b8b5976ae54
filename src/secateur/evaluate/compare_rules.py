"""ShrinkBench's rules for a comparison (Blalock et al., arXiv:2003.03033), each a function that says kept or broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from secateur.report.run_facts import DENSE, Cell, Metric, in_order
from secateur.report.words import counted, join

POINTS = 5
"""Sparsities of a method that make a curve."""
LEAST, ENOUGH = 3, 5
"""Seeds that show a spread, and that a verdict needs."""
ABOUT = 0.25
"""How far the small dense network's parameters may be from the non-zeros of the pruned one."""
MOST_NAMED = 4
"""Exceptions that a sentence names."""


@dataclass(frozen=True)
class Rule:
    """A rule, whether it was kept, and what there is to say."""

    name: str
    kept: bool
    said: str


@dataclass(frozen=True)
class Case:
    """What the rules look at: the cells, the baseline, the metric, and the seeds that were asked for."""

    cells: Sequence[Cell]
    baseline: str
    metric: Metric
    seeds: tuple[int, ...]

    @cached_property
    def at(self) -> dict[tuple[str, float], list[Cell]]:
        """The cells of each method at each sparsity."""
        found: dict[tuple[str, float], list[Cell]] = {}
        for c in self.cells:
            found.setdefault((c.method, c.asked), []).append(c)
        return found

    @cached_property
    def pruned(self) -> list[tuple[str, float]]:
        """Each method but dense at each of its sparsities."""
        names = in_order(c.method for c in self.cells)
        return sorted((key for key in self.at if key[0] != DENSE), key=lambda key: (names.index(key[0]), key[1]))

    @cached_property
    def asked(self) -> list[float]:
        """Every sparsity, rising."""
        return sorted({asked for _, asked in self.pruned})

    def pairs(self, one: tuple[str, float], other: tuple[str, float]) -> list[float]:
        """``one`` minus ``other``, for each seed that was asked for and that both have a finite value of."""
        a, b = self.metric.scores.get(one, {}), self.metric.scores.get(other, {})
        return [a[s] - b[s] for s in self.seeds if s in a and s in b]


def check_all(case: Case) -> tuple[Rule, ...]:
    """Every rule."""
    return tuple(rule(case) for rule in RULES)


def operating_points(case: Case) -> Rule:
    """Five or more sparsities a method."""
    counts = {m: sum(name == m for name, _ in case.pruned) for m, _ in case.pruned}
    few = [f"{m} has {n}" for m, n in counts.items() if n < POINTS]
    said = (
        f"every method has {min(counts.values())} sparsities"
        if not few
        else f"{_named(few)}; {POINTS} or more tell a curve"
    )
    return Rule("operating points", not few, said)


def both_sizes(case: Case) -> Rule:
    """Parameters and FLOPs of every cell."""
    lost = {
        "parameters": [c for c in case.cells if c.nonzero is None],
        "FLOPs": [c for c in case.cells if c.effective_flops is None],
    }
    told = [f"{what} of {len(some)} of {len(case.cells)} cells" for what, some in lost.items() if some]
    if not told:
        return Rule("parameters and FLOPs", True, f"both are counted for all {len(case.cells)} cells")
    why = "the run is an older one, or its data has no example that the network can be called with"
    return Rule("parameters and FLOPs", False, f"unknown are {join(told)}: {why}")


def enough_seeds(case: Case) -> Rule:
    """Three seeds or more, with their spread; a verdict needs five."""
    least = min(len(case.pairs(key, (case.baseline, key[1]))) for key in case.pruned)
    told = f"{counted(least, 'seed')} everywhere"
    if least >= ENOUGH:
        return Rule("seeds", True, f"{told}, with 95 % intervals")
    if least >= LEAST:
        return Rule("seeds", True, f"{told}, which show a spread; a verdict needs {ENOUGH}")
    return Rule("seeds", False, f"{told}: a spread needs {LEAST}, a verdict {ENOUGH}")


def every_cell(case: Case) -> Rule:
    """Every seed that was asked for is there, with a finite metric."""
    keys = [(m, a) for m in in_order(m for m, _ in case.pruned) for a in case.asked]
    lost = [
        f"{method} at {asked:.4g} lacks {_seeds(gone)}"
        for method, asked in [(DENSE, 0.0), *keys]
        if (gone := [s for s in case.seeds if s not in case.metric.scores.get((method, asked), {})])
    ]
    fine = f"a finite {case.metric.name} for each of {counted(len(case.seeds), 'seed')} everywhere"
    return Rule("nothing missing", not lost, _named(lost) if lost else fine)


def random_control(case: Case) -> Rule:
    """Random pruning, at every sparsity."""
    return _control(case, "random", "weights pruned at random")


def small_dense_control(case: Case) -> Rule:
    """A dense network of as many parameters, at every sparsity."""
    found = _control(case, "small dense", "dense networks of as many parameters as are left")
    odd = []
    for method, asked in case.pruned if found.kept else []:
        for c in case.at[method, asked]:
            pruned = next((b.nonzero for b in case.at.get((case.baseline, asked), []) if b.seed == c.seed), None)
            if c.control == "small dense" and c.nonzero and pruned and abs(c.nonzero / pruned - 1) > ABOUT:
                odd.append(f"{c.nonzero:,} parameters at {asked:.4g}, where {pruned:,} are left of the pruned")
    odd = in_order(odd)
    return found if not odd else Rule(found.name, False, f"{method_of(case, 'small dense')} has {_named(odd)}")


def method_of(case: Case, control: str) -> str:
    """The method that is a control, or nothing."""
    return next((c.method for c in case.cells if c.control == control), "")


def _control(case: Case, control: str, what: str) -> Rule:
    at = {c.asked for c in case.cells if c.control == control}
    lost = [f"{a:.4g}" for a in case.asked if a not in at]
    if not at:
        return Rule(f"{control} control", False, f"there are no {what}")
    if lost:
        return Rule(f"{control} control", False, f"there are no {what} at {_named(lost)}")
    return Rule(f"{control} control", True, f"{method_of(case, control)}: {what}, at every sparsity")


BEGINS = {"init": "set of initial weights", "dense": "trained dense network", "batch": "first batch"}


def same_start(case: Case) -> Rule:
    """Of a seed, all begin with the same weights, or with the same dense network, and train in the same order."""
    known = [c for c in case.cells if c.begins]
    odd = []
    for key, what in BEGINS.items():
        for seed in in_order(c.seed for c in known):
            groups: dict[str, list[str]] = {}
            for c in known:
                if c.seed == seed and key in c.begins:
                    groups.setdefault(c.begins[key], []).append(c.method)
            if len(groups) > 1:
                told = " and another for ".join(join(in_order(names)) for names in groups.values())
                odd.append(f"seed {seed} has one {what} for {told}")
    name, unknown = "same start and data order", len(case.cells) - len(known)
    if odd:
        return Rule(name, False, _named(odd))
    if unknown:
        return Rule(name, False, f"not known of {unknown} of {len(case.cells)} cells, which an older version made")
    small = method_of(case, "small dense")
    besides = f"; {small} is another network, on the same batches" if small else ""
    return Rule(
        name, True, f"in every seed the same initial weights, dense network and first batch, by their digests{besides}"
    )


def same_budget(case: Case) -> Rule:
    """At each sparsity as many epochs as the baseline."""
    odd: dict[str, list[tuple[float, float]]] = {}
    for method, asked in case.pruned:
        base = case.at.get((case.baseline, asked))
        if base and (case.at[method, asked][0].epochs != base[0].epochs):
            odd.setdefault(method, []).append((case.at[method, asked][0].epochs, base[0].epochs))
    told = [f"{m} was trained for {_span([a for a, _ in some])} epochs, {case.baseline} for {_span([b for _, b in some])}"
            for m, some in odd.items()]  # fmt: skip
    fine = f"{_span([c.epochs for c in case.cells if c.method != DENSE])} epochs for all at each sparsity"
    return Rule("same training budget", not odd, _named(told) if told else fine)


def last_step(case: Case) -> Rule:
    """Scored once, after the last update: no best epoch on the test part."""
    name = "last step, not the best"
    early = in_order(c.method for c in case.cells if c.whole is False)
    unknown = sum(c.whole is None for c in case.cells)
    if early:
        return Rule(name, False, f"{_named(early)} ended before the last update that was asked for")
    if unknown:
        return Rule(name, False, f"not known of {unknown} of {len(case.cells)} cells, which an older version made")
    return Rule(name, True, "every network was scored once, after its last update, and nothing was chosen by the score")


def both_values(case: Case) -> Rule:
    """Absolute values, and differences from the dense network."""
    there = case.metric.scores.get((DENSE, 0.0), {})
    lost = [s for s in case.seeds if s not in there]
    name = "absolute and relative values"
    if lost:
        return Rule(name, False, f"the dense network lacks {_seeds(lost)}, so there are no differences from it")
    return Rule(name, True, f"{case.metric.name} itself, and its difference from the dense network of the same seed")


RULES: tuple[Callable[[Case], Rule], ...] = (
    operating_points, both_sizes, enough_seeds, every_cell, random_control, small_dense_control, same_start, same_budget,
    last_step, both_values,
)  # fmt: skip


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {join([str(s) for s in seeds])}"


def _span(values: Iterable[float]) -> str:
    """The range of some numbers.

    >>> _span([20.0, 20.0]), _span([24.0, 32.0, 28.0])
    ('20', '24 to 32')
    """
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def _named(told: Sequence[str]) -> str:
    """Some exceptions, and how many more there are."""
    more = len(told) - MOST_NAMED
    return join([*told[:MOST_NAMED], f"{more} more"] if more > 0 else list(told))
