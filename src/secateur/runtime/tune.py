"""Measuring a table: how many times as fast as dense each layout is on this machine, by either route.

A ratio is the median over turns in which dense and all candidates ran one after the other. What a table holds is the least over
the conditions in which a matrix may be used: weights that come from memory, as those of a large model do (so many copies
are used in turn that they do not fit into the last-level cache) and, where that is possible, weights that come from that
cache, as those of a small model do (too many copies for the second level); one thread, and all of them. From `NEAR_FROM`
rows arithmetic decides, and weights in the cache are measured alone, of which packing saves less.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, product
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from secateur.core.lay_out import arranged
from secateur.core.layouts import LAYOUTS, Layout
from secateur.errors import BadInput

from .candidates import BY, Run, activations, copies_of, dense, packed, sparse
from .grid import NAMES, ROUTES, Grid, Route
from .machine import cache_bytes, core_cache_bytes, machine
from .table import LEAST, Table, active, key, using
from .timing import quiet, take_turns, threads

NEAR_FROM = 64
EXPAND_FROM = 16
"""Rows below which expanding is hopeless, and not measured."""
HOPELESS = 0.5
"""A kernel below this at `NEAR_FROM` rows or more is not measured at more."""
DOUBT = 0.05
"""Ratios so near to `LEAST` are measured three times as often."""
ENOUGH = 1 << 20
"""Weights that are multiplied in one timing, at least."""
LONG = 0.5
"""Seconds of a turn from which fewer turns are taken."""
Progress = Callable[[int, int, str], None]
Name = tuple[Layout, Route]
DENSE: Any = "dense"


@dataclass(frozen=True)
class Size:
    """The steps of a table's axes, and how often each point is measured."""

    sides: tuple[int, ...] = (192, 384, 768, 4096)
    densities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    turns: int = 7


FULL = Size()
QUICK = Size((768, 2048), (0.1, 0.3, 0.5), (1, 16, 128, 512), 3)


def tune(
    *, dtypes: Sequence[str] = ("float32", "bfloat16"), size: Size = FULL, progress: Progress | None = None
) -> Table:
    """Measures a table for this machine, with as many of torch's threads as are set, and with one.

    Args:
        dtypes: of ``"float32"``, ``"bfloat16"``, ``"float16"``.
        size: `FULL`, some minutes; or `QUICK`, which knows less, and so gains less.
        progress: called with what is done, of how much, and what comes next.

    Raises:
        BadInput: another dtype.
    """
    if not dtypes or (odd := [d for d in dtypes if d not in NAMES]):
        raise BadInput(f"a table is measured for {', '.join(NAMES)}; got {', '.join(odd) if dtypes else 'none'}.")
    total, grids = len(dtypes) * len(size.sides) ** 2 * len(size.densities), []
    for done, name in enumerate(dtypes):
        tell = partial(_told, progress, done * (total // len(dtypes)), total)
        grids.append(_grid(name, size, tell))
    return Table(tuple(grids))


def _told(progress: Progress | None, before: int, total: int, done: int, what: str) -> None:
    if progress is not None:
        progress(before + done, total, what)


def _grid(name: str, size: Size, tell: Callable[[int, str], None]) -> Grid:
    dtype = NAMES[name]
    found: dict[Layout, dict[Route, list[float]]] = {la: {r: [] for r in ROUTES} for la in LAYOUTS}
    points = product(size.sides, size.sides, size.densities)
    for i, (out, columns, density) in enumerate(points):
        tell(i, f"{name}, {out} x {columns}, {density:.0%}")
        for at_rows in _point(out, columns, density, dtype, size):
            for (layout, route), ratio in at_rows.items():
                found[layout][route].append(ratio)
    ratios: dict[str, dict[str, tuple[float, ...]]] = {
        layout: {r: tuple(v) for r, v in routes.items()} for layout, routes in found.items()
    }
    counts = " and ".join(map(str, sorted({1, torch.get_num_threads()})))
    where = f"{machine()}, measured with {counts} threads"
    return Grid(name, key(dtype), where, size.sides, size.sides, size.densities, size.rows, ratios)


def _point(
    out: int, columns: int, density: float, dtype: torch.dtype, size: Size
) -> Iterator[dict[tuple[Layout, Route], float]]:
    """For each number of rows, the ratio of each layout and route; 0 where none was measured."""
    subject = Subject(sparse(out, columns, density, dtype))
    hopeless: set[Layout] = set()
    for rows in size.rows:
        names: list[Name] = [(la, "kernel") for la in LAYOUTS if la not in hopeless]
        names += [(la, "expand") for la in LAYOUTS if rows >= EXPAND_FROM]
        x = activations(rows, columns, dtype)
        found = [subject.ratios(names, x, copies, size.turns) for copies in subject.conditions(rows)]
        least = {name: round(min(f[name] for f in found), 3) for name in names}
        hopeless |= {la for la in LAYOUTS if rows >= NEAR_FROM and least.get((la, "kernel"), 1.0) < HOPELESS}
        yield {(la, r): least.get((la, r), 0.0) for la in LAYOUTS for r in ROUTES}


class Subject:
    """A matrix, dense and in all layouts, so many times over that the copies together do not fit into the cache."""

    def __init__(self, weight: Tensor) -> None:
        columns = weight.shape[1]
        near = -(-4 * core_cache_bytes() // weight.nbytes)
        self.near = near if near * weight.nbytes <= cache_bytes() // 2 else 1
        self.fits = weight.nbytes <= cache_bytes() // 2
        self.some = max(1, ENOUGH // weight.numel())
        laid = {layout: arranged(weight, layout) for layout in LAYOUTS}
        self.dense: list[Run] = []
        self.packed: dict[Layout, list[Run]] = {la: [] for la in LAYOUTS}
        for _ in range(copies_of(weight.nbytes)):
            self.dense.append(dense(weight.clone()))
            for layout, (where, values, starts) in laid.items():
                self.packed[layout].append(packed((where.clone(), values.clone(), starts.clone()), layout, columns))

    def conditions(self, rows: int) -> list[tuple[bool, int]]:
        """Whether the weights come from memory, and with how many threads."""
        places = [False] if rows >= NEAR_FROM else [True, False] if self.fits else [True]
        return list(product(places, sorted({1, torch.get_num_threads()})))

    def ratios(self, names: Sequence[Name], x: Tensor, condition: tuple[bool, int], turns: int) -> dict[Name, float]:
        """Times as fast as dense, in one condition."""
        cold, n = condition
        held = len(self.dense) if cold else self.near
        runs = {DENSE: (self.dense, active())} | {(la, r): (self.packed[la], BY[r]) for la, r in names}
        passes = {
            name: partial(_pass, cycle(each[:held]), min(held, self.some), table, x)
            for name, (each, table) in runs.items()
        }
        with quiet(), threads(n):
            start = perf_counter()
            passes[DENSE]()
            taken = min(turns, 3) if (perf_counter() - start) * len(passes) > LONG else turns
            times = take_turns(passes, taken)
            found = {name: times[DENSE].per(times[name]) for name in names}
            doubt = {name: passes[name] for name in (DENSE, *names) if name == DENSE or _in_doubt(name, found)}
            if len(doubt) > 1:
                times = take_turns(doubt, 2 * taken)
                found |= {name: found[name] + times[DENSE].per(times[name]) for name in doubt if name != DENSE}
        return {name: statistics.median(ratios) for name, ratios in found.items()}


def _in_doubt(name: Name, found: Mapping[Name, list[float]]) -> bool:
    """Whether a decision hangs on a few hundredths: the ratio is near to what a table asks for, and no other route is better."""
    ratio = {n: statistics.median(found[n]) for n in found if n[0] == name[0]}
    return abs(ratio[name] / LEAST - 1) < DOUBT and ratio[name] > (1 - DOUBT) * max(ratio.values())


def _pass(copies: Iterator[Run], count: int, table: Table, x: Tensor) -> None:
    """Calls the next few copies."""
    with using(table):
        for run in islice(copies, count):
            run(x)
