"""Which layout a pruned matrix gets, or none: from a table of what was measured, so that nothing becomes slower than dense.

A `Grid` holds, for one dtype on one kind of processor, how many times as fast as torch's dense product each layout was, over
sizes, densities and numbers of rows. Two routes lead through a layout: ``kernel`` multiplies the packed matrix; ``expand``
makes it dense again, a panel at a time, for torch's own product, which pays where rows are many.

Reading between what was measured takes the *least* of the neighbours on every axis, and nothing is gained outside: below the
smallest matrix and above the highest density the ratio is 0. Larger and sparser matrices, and more rows, count as the last
that was measured: their time is that many times longer, packed and dense.

The choice depends on the table, the kind of processor and the matrix alone, never on the clock or on the number of threads: the
same machine gives the same bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secateur import native
from secateur.core.layouts import LAYOUTS, MOST_COLUMNS, Layout
from secateur.errors import BadInput
from secateur.native import products

from .grid import MOST_STEPS, Grid, Route, is_number, named, need, read_grid
from .machine import processor

LEAST = 0.97
"""A layout that is slower than this share of dense at some number of rows is not used."""
WORTH = 1.05
"""A layout that is nowhere faster than this is not used."""
MATTER = (1, 16, 128)
"""Rows by whose ratios layouts are compared: a token at a time, a small batch, a sentence."""
VERSION = 1
MOST_BYTES = 8 << 20
FOR_BFLOAT16 = {"avx512bf16": "avx512", "amx": "avx512"}
"""Kernels that are others for bfloat16 alone, and what they are for the rest."""
MAKERS = ("AMD", "Intel", "ARM", "Apple")
EXPAND_FROM = 256
"""Rows from which a matrix is expanded where no table says so."""


@dataclass(frozen=True, eq=False)
class Table:
    """What was measured: a `Grid` for each dtype and kind of processor. ``secateur tune`` makes one.

    Attributes:
        grids: what was measured.
        always: the route for everything, whatever the grids say; for those who measure it, and not in a file.
        most_rows: rows beyond which nobody minds that a layer becomes slower; see `up_to`. Not in a file either.
    """

    grids: tuple[Grid, ...]
    always: Route | None = None
    most_rows: int | None = None

    def up_to(self, rows: int | None) -> Table:
        """The same table, asked about activations of at most so many rows; ``None`` means any number.

        Raises:
            BadInput: no number of rows.
        """
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise BadInput(f"rows is the most rows of activations that matter, a whole number from 1; got {rows!r}.")
        return replace(self, most_rows=rows)

    def grid(self, dtype: torch.dtype) -> Grid | None:
        """The grid of a dtype for the processor and the kernels in use, or ``None``.

        One that was measured on a processor of another maker is not it: torch's dense product is much slower on some.
        """
        wanted, here = (named(dtype), key(dtype)), maker(processor())
        return next((g for g in self.grids if (g.dtype, g.key) == wanted and maker(g.machine) in ("", here)), None)

    def to_json(self) -> str:
        """The table as JSON text, which `from_json` reads."""
        return json.dumps({"version": VERSION, "grids": [asdict(g) for g in self.grids]})

    @staticmethod
    def from_json(text: str) -> Table:
        """Reads a table.

        Raises:
            BadInput: it is not one: another version, keys or numbers that cannot be, lists of the wrong length.
        """
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise BadInput(f"a table is JSON, as secateur tune writes it; this cannot be read: {e}") from None
        need(isinstance(facts, dict) and set(facts) == {"version", "grids"}, "it has `version` and `grids`")
        need(
            is_number(facts["version"]) and facts["version"] == VERSION,
            f"its version is {VERSION}; got {facts['version']!r}",
        )
        need(isinstance(facts["grids"], list) and len(facts["grids"]) <= MOST_STEPS, "`grids` is a short list")
        return Table(tuple(read_grid(g) for g in facts["grids"]))

    @staticmethod
    def read(path: str | Path) -> Table:
        """Reads a table from a file; `BadInput` where there is none."""
        path = Path(path)
        try:
            if path.stat().st_size > MOST_BYTES:
                raise BadInput(f"{path} has {path.stat().st_size:,} bytes; a table has at most {MOST_BYTES:,}.")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"the table {path} cannot be read: {e}") from None
        try:
            return Table.from_json(text)
        except BadInput as e:
            raise BadInput(f"{path}: {e}") from None


Given = Table | str | os.PathLike[str] | None
"""A table, the path of one, or the one in use."""


def given(table: Given) -> Table:
    """The table itself.

    Raises:
        BadInput: a path of something else.
    """
    if table is None:
        return active()
    return (
        table
        if isinstance(table, Table)
        else _read(str(table), Path(table).stat().st_mtime_ns if Path(table).exists() else 0)
    )


@lru_cache(maxsize=8)
def _read(path: str, changed: int) -> Table:
    return Table.read(path)


class Choice(NamedTuple):
    """A layout, or ``None`` for dense, and why."""

    layout: Layout | None
    why: str


def choose(
    out_features: int, in_features: int, density: float, dtype: torch.dtype, table: Given = None
) -> Layout | None:
    """The layout a matrix gets, or ``None``: it stays dense, for nothing is known to be gained.

    Args:
        out_features, in_features: its shape.
        density: share of its elements that are stored.
        dtype: of weight and activations.
        table: what was measured, or the path of it; by default what ``SECATEUR_TABLE`` names, else what came with the package.

    Example:
        >>> choose(4096, 4096, 0.99, torch.float32) is None   # next to nothing to leave out
        True
    """
    return decide(out_features, in_features, density, dtype, table).layout


def decide(out_features: int, in_features: int, density: float, dtype: torch.dtype, table: Given = None) -> Choice:
    """What `choose` gives, and a sentence that says why."""
    asked = given(table)
    grid, most = asked.grid(dtype), asked.most_rows
    if grid is None:
        kind = " ".join(filter(None, (maker(processor()), key(dtype))))
        return Choice(None, f"nothing was measured for {named(dtype)} on {kind}; `secateur tune` does")
    if outside := _outside(grid, out_features, in_features, density):
        return Choice(None, outside)
    shape = out_features, in_features, density
    mattering = [n for n in MATTER if most is None or n <= most]
    found: list[tuple[float, Layout]] = []
    slow: list[tuple[float, str]] = []
    for layout in LAYOUTS:
        if layout not in grid.ratios or (layout == "csr" and in_features > MOST_COLUMNS):
            continue
        worst, rows = grid.worst(layout, *shape, most)
        if worst < LEAST:
            slow.append((worst, f"{layout} would be {worst:.2f} times as fast as dense at {_rows(rows)}"))
        else:
            gains = [grid.best(layout, *shape, n)[0] for n in mattering]
            found.append((math.prod(gains) if max(gains) >= WORTH else 0.0, layout))
    if not found:
        return Choice(None, max(slow, default=(0.0, "nothing was measured of any layout"))[1])
    gain, layout = max(found, key=lambda f: f[0])
    if not gain:
        return Choice(None, f"nothing is gained: no layout is {WORTH} times as fast as dense")
    said = ", ".join(f"{grid.best(layout, *shape, n)[0]:.2f} at {_rows(n)}" for n in mattering)
    return Choice(layout, f"times as fast as dense, at least, by the table: {said}")


def route(
    layout: Layout, rows: int, density: float, out_features: int, in_features: int, dtype: torch.dtype,
    table: Given = None,
) -> Route:  # fmt: skip
    """Whether the kernel multiplies, or the matrix is expanded for torch's dense product.

    Args:
        layout: how the matrix lies.
        rows: of the activation.
        density, out_features, in_features, dtype, table: as `choose` takes them.

    Example:
        >>> route("csr", 1, 0.05, 4096, 4096, torch.float64)   # of which there is no table
        'kernel'
    """
    return _route(given(table), dtype, _kernels(), layout, rows, density, out_features, in_features)


@lru_cache(maxsize=8192)
def _route(
    table: Table, dtype: torch.dtype, kernels: str, layout: Layout, rows: int, density: float, out: int, columns: int
) -> Route:
    if table.always is not None:
        return table.always
    grid = table.grid(dtype)
    if grid is not None and layout in grid.ratios:
        ratio, better = grid.best(layout, out, columns, density, rows)
        if ratio:
            return better
    return "kernel" if rows < EXPAND_FROM else "expand"


def key(dtype: torch.dtype) -> str:
    """The kind of processor that a grid of this dtype is about: the kernels in use, and what torch's dense product has.

    ``base``, ``avx2``, ``avx512`` and so on, as `secateur.native.products.isa` says, ``none`` without kernels; for bfloat16
    and float16 also ``+amx``, ``+bf16`` or ``+fp16`` where torch has such instructions.
    """
    kernels = _kernels()
    if dtype != torch.bfloat16:
        kernels = FOR_BFLOAT16.get(kernels, kernels)
    return kernels + _dense(dtype)


def maker(machine: str) -> str:
    """Whose processor a machine has, by its name; empty where that does not say.

    >>> maker("AMD EPYC, 2 cores"), maker("Intel(R) Xeon(R) Processor"), maker("a processor")
    ('AMD', 'Intel', '')
    """
    return next((name for name in MAKERS if name in machine), "")


def _kernels() -> str:
    return products.isa() if native.available() else "none"


@cache
def _dense(dtype: torch.dtype) -> str:
    if dtype == torch.float32 or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return ""
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # later than the oldest torch there may be
    short = "bf16" if dtype == torch.bfloat16 else "fp16"
    return "+amx" if has.get(f"amx_{short}") else f"+{short}" if has.get(f"avx512_{short}") else ""


_used: list[Table] = []


def active() -> Table:
    """The table in use: that of `using`, else the file that ``SECATEUR_TABLE`` names, else what came with the package."""
    return _used[-1] if _used else _found()


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Inside, this table is in use, in all threads."""
    _used.append(table)
    try:
        yield
    finally:
        _used.pop()


@cache
def _found() -> Table:
    path = os.environ.get("SECATEUR_TABLE")  # read once, as SECATEUR_ISA is
    return Table.read(path) if path else packaged()


@cache
def packaged() -> Table:
    """The tables that came with the package, as one."""
    files = sorted((Path(__file__).parent / "tables").glob("*.json"))
    return Table(tuple(g for f in files for g in Table.read(f).grids))


def _outside(grid: Grid, out: int, columns: int, density: float) -> str:
    if out < grid.out[0] or columns < grid.columns[0]:
        return f"{out} x {columns} is smaller than what was measured, {grid.out[0]} x {grid.columns[0]}"
    if density > grid.densities[-1]:
        return f"{density:.1%} of it is not zero; gains were looked for up to {grid.densities[-1]:.0%}"
    return ""


def _rows(n: int) -> str:
    return f"{n} row{'s' * (n != 1)}"
