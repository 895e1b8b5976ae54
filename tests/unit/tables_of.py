"""Tables for tests: what the kernel and the expanded route reach is given, not measured."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from secateur.runtime.grid import Grid
from secateur.runtime.table import Table, key

OUT, COLUMNS, DENSITIES, ROWS = (128, 1024), (128, 4096), (0.05, 0.1, 0.5), (1, 16, 128, 512)
Ratio = Callable[[int, int, float, int], float]


def flat(ratio: Ratio) -> tuple[float, ...]:
    return tuple(ratio(*point) for point in product(OUT, COLUMNS, DENSITIES, ROWS))


def grid_of(bitmask: tuple[Ratio, Ratio], csr: tuple[Ratio, Ratio] | None = None, dtype: str = "float32") -> Grid:
    """A grid of what the kernel and the expanded route of each layout reach."""
    given = {"bitmask": bitmask} | ({"csr": csr} if csr else {})
    ratios = {layout: {"kernel": flat(k), "expand": flat(e)} for layout, (k, e) in given.items()}
    return Grid(dtype, key(getattr(torch, dtype)), "a test", OUT, COLUMNS, DENSITIES, ROWS, ratios)


def table_of(*layouts: tuple[Ratio, Ratio], dtype: str = "float32") -> Table:
    return Table((grid_of(*layouts, dtype=dtype),))


def kernel(out: int, columns: int, density: float, rows: int) -> float:
    """Good at few rows, the better the sparser; bad at many."""
    return {1: 0.3 / density, 16: 0.2 / density, 128: 0.5, 512: 0.2}[rows]


def expand(out: int, columns: int, density: float, rows: int) -> float:
    return {1: 0.1, 16: 0.98, 128: 0.99, 512: 1.0}[rows]


def constant(value: float) -> Ratio:
    return lambda *point: value


BOTH = (kernel, expand)
