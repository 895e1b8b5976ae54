"""What was measured of packed matrices, as a grid of numbers: read with distrust, and between its points with caution."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal

import torch

from secateur.core.layouts import DTYPES, LAYOUTS
from secateur.errors import BadInput

Route = Literal["kernel", "expand"]
ROUTES: tuple[Route, ...] = ("kernel", "expand")
MOST_STEPS, MOST_RATIO, LARGEST = 64, 1e4, 1 << 40


def named(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


NAMES = {named(d): d for d in DTYPES}


@dataclass(frozen=True, eq=False)
class Grid:
    """How many times as fast as dense the product with a packed matrix was.

    Attributes:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        key: the kind of processor, as `key` names it.
        machine: the machine it was measured on, in words.
        out, columns, densities, rows: the steps of the axes, ascending: sizes of the matrix, shares that are not zero,
            rows of the activation; rows begin with 1.
        ratios: for each layout and route a number for every point, the last axis fastest; 0 where nothing was measured.
    """

    dtype: str
    key: str
    machine: str
    out: tuple[int, ...]
    columns: tuple[int, ...]
    densities: tuple[float, ...]
    rows: tuple[int, ...]
    ratios: Mapping[str, Mapping[str, tuple[float, ...]]]

    def ratio(self, layout: str, route: Route, out_features: int, in_features: int, density: float, rows: int) -> float:
        """Times as fast as dense: the least of the measured neighbours; 0 where no gain is known."""
        found = self.ratios[layout][route]
        where = (
            _near(self.out, out_features), _near(self.columns, in_features),
            _near(self.densities, max(density, self.densities[0])), _near(self.rows, max(rows, 1)),
        )  # fmt: skip
        if density > self.densities[-1]:
            return 0.0
        sizes = len(self.columns), len(self.densities), len(self.rows)
        flat = (((o * sizes[0] + c) * sizes[1] + d) * sizes[2] + r for o, c, d, r in product(*where))
        return min((found[i] for i in flat), default=0.0)

    def best(self, layout: str, out_features: int, in_features: int, density: float, rows: int) -> tuple[float, Route]:
        """The better route, and its ratio."""
        asked = out_features, in_features, density, rows
        return max(((self.ratio(layout, r, *asked), r) for r in ROUTES), key=lambda found: found[0])

    def worst(
        self, layout: str, out_features: int, in_features: int, density: float, most: int | None = None
    ) -> tuple[float, int]:
        """The least ratio over all numbers of rows, up to ``most``, by the better route for each, and the rows it belongs to."""
        between = [(a + b) // 2 for a, b in pairwise(self.rows)]
        every = {*self.rows, *between, self.rows[-1] + 1}
        if most is not None:
            every = {n for n in every if n <= most} | {most}
        return min((self.best(layout, out_features, in_features, density, n)[0], n) for n in sorted(every))


def _near(axis: tuple[Any, ...], value: float) -> tuple[int, ...]:
    """The steps of an axis on both sides of a value: one where it is met or lies above the last, none below the first."""
    i = bisect_left(axis, value)
    if i == len(axis):
        return (i - 1,)
    return (i,) if axis[i] == value else (i - 1, i) if i else ()


# What is read was written by anybody


def read_grid(facts: Any) -> Grid:
    """A grid from what JSON gave.

    Raises:
        BadInput: it is not one; says what one has.
    """
    fields = ("dtype", "key", "machine", "out", "columns", "densities", "rows", "ratios")
    need(isinstance(facts, dict) and set(facts) == set(fields), f"a grid has {', '.join(fields)}")
    texts = (facts["dtype"], facts["key"], facts["machine"])
    need(all(isinstance(t, str) and len(t) <= 500 for t in texts), "dtype, key and machine are short texts")
    need(facts["dtype"] in NAMES, f"dtype is one of {', '.join(NAMES)}; got {facts['dtype']!r}")
    out, columns, rows = (_steps(facts[f], f, int) for f in ("out", "columns", "rows"))
    densities = _steps(facts["densities"], "densities", float)
    need(rows[0] == 1, f"rows begin with 1; got {rows[0]}")
    need(densities[-1] <= 1, f"a density is at most 1; got {densities[-1]}")
    points = len(out) * len(columns) * len(densities) * len(rows)
    dtype, kind, where = texts
    return Grid(dtype, kind, where, out, columns, densities, rows, _ratios(facts["ratios"], points))


def _steps(found: Any, name: str, kind: type) -> tuple[Any, ...]:
    ok = isinstance(found, list) and 0 < len(found) <= MOST_STEPS and all(is_number(v) for v in found)
    ok = ok and all(kind is float or isinstance(v, int) for v in found) and found[0] > 0
    need(ok and all(a < b for a, b in pairwise(found)), f"`{name}` holds ascending numbers above 0")
    return tuple(kind(v) for v in found)


def _ratios(found: Any, points: int) -> dict[str, dict[str, tuple[float, ...]]]:
    need(isinstance(found, dict) and set(found) <= set(LAYOUTS), f"ratios are of {', '.join(LAYOUTS)}")
    for layout, routes in found.items():
        need(isinstance(routes, dict) and set(routes) == set(ROUTES), f"{layout} has {' and '.join(ROUTES)}")
        for name, values in routes.items():
            ok = isinstance(values, list) and len(values) == points
            need(ok, f"{layout}, {name} has a number for each of {points} points")
            ok = all(is_number(v) and 0 <= v <= MOST_RATIO for v in values)
            need(ok, f"ratios lie between 0 and {MOST_RATIO:g}; {layout}, {name} has another")
    return {layout: {r: tuple(map(float, v)) for r, v in routes.items()} for layout, routes in found.items()}


def is_number(v: Any) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= LARGEST  # also neither NaN nor Inf


def need(ok: bool, what: str) -> None:
    if not ok:
        raise BadInput(f"this is not a table of secateur: {what}.")
