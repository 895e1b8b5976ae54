"""Peak memory of pruning beyond the model itself, from child processes, in percent of the weights."""

from __future__ import annotations

import statistics
from typing import Any

import torch

import secateur
from benchmarks import child, machine
from benchmarks.models import FULL_WIDTH, QUICK_WIDTH, encoder, weights_of
from benchmarks.result import Bar, Result, Table
from benchmarks.speed import DTYPES, WAYS, against_torch
from benchmarks.timing import spread

MOST_PERCENT = 5.0


def peak(width: int, dtype: str, way: str | None) -> dict[str, int]:
    """In a child: builds the model, prunes it in a way (or not), and says what was held before and at the most."""
    model = encoder(width, getattr(torch, dtype))
    held = machine.held_bytes()
    if way is not None:
        secateur.prune(model, **WAYS[way])
    return {"held": held, "peak": machine.peak_bytes()}


def extra(width: int, dtype: str, way: str, repeats: int) -> list[float]:
    """Peak of a child that prunes, beyond that of one that only builds the model; in percent of the weights, each repeat.

    Where the child held less before pruning than its peak so far, the difference is counted as pruning's too.
    """
    size = weights_of(width) * getattr(torch, dtype).itemsize
    found = []
    for _ in range(repeats):
        idle = _peak(width, dtype, None)["peak"]
        busy = _peak(width, dtype, way)
        found.append(100 * (busy["peak"] - min(idle, busy["held"])) / size)
    return found


def _peak(width: int, dtype: str, way: str | None) -> dict[str, int]:
    found: dict[str, Any] = child.call("benchmarks.memory", "peak", width=width, dtype=dtype, way=way)
    return found


def run(full: bool) -> Result:
    """Measures everything this page is about."""
    before = machine.load()
    repeats = 3 if full else 1
    rows, bars = [], []
    for dtype in DTYPES:
        for way in WAYS:
            percent = extra(FULL_WIDTH, dtype, way, repeats)
            rows.append((f"{dtype}, {way}", spread(percent)))
            bars.append(Bar(f"{dtype}, {way}: extra memory", statistics.median(percent), MOST_PERCENT, unit=" %"))
    size = (
        f"{weights_of(FULL_WIDTH) / 1e6:.0f} M weights in 110 tensors; {repeats} pairs of processes: median (min–max)"
    )
    tables = [Table(size, ("<", "extra peak, % of the weights"), rows)]
    width = FULL_WIDTH if full else QUICK_WIDTH
    rows = [(dtype, f"{100 * against_torch(width, dtype)['torch_extra']:.0f}") for dtype in DTYPES]
    size = f"torch.nn.utils.prune.global_unstructured, {weights_of(width) / 1e6:.0f} M weights, once"
    tables.append(Table(size, ("<", "extra peak, % of the weights"), rows))
    command = f"python -m benchmarks memory{' --full' if full else ''}"
    return Result("memory", command, machine.machine(before), tables, bars)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["memory"])
