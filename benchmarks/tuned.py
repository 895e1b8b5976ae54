"""The table that packing chooses by in a benchmark: the one in use, or one that is measured first where that knows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.result import Table
from secateur.runtime import table
from secateur.runtime.grid import named
from secateur.runtime.tune import FULL, Size, tune

DTYPES = (torch.bfloat16, torch.float32)


@contextmanager
def in_use(size: Size | None = FULL) -> Iterator[Table]:
    """Where the table in use knows nothing of this processor, another is measured, of a size, and used inside.

    Args:
        size: ``None`` for none; then nothing is packed where the table knows nothing.

    Yields:
        What packing chooses by, in words.
    """
    known = table.active()
    missing = [named(d) for d in DTYPES if known.grid(d) is None]
    made = tune(dtypes=missing, size=size).grids if missing and size else ()
    with table.using(table.Table((*known.grids, *made))):
        grids = [(d, table.active().grid(d)) for d in DTYPES]
        rows = [
            (named(d), "nothing; all stays dense" if g is None else _said(g, named(d) in missing)) for d, g in grids
        ]
        yield Table("What packing chooses by", ("<dtype", "<measured"), rows)


def _said(grid: table.Grid, anew: bool) -> str:
    return f"{'by this benchmark, before it began' if anew else 'before'}: {grid.key}, {grid.machine}"
