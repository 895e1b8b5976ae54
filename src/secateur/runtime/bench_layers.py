"""Timing every matrix of a target, packed and dense, one after another as a model runs them.

A candidate runs through all matrices of a chunk, each of which is timed, then the next candidate does. A chunk is so large that
its dense float32 weights do not fit into the cache, so that a matrix comes from memory when its turn comes again; a target
that is smaller is one chunk, and runs from the cache as it would in use. Memory is bounded by a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from secateur.core.layouts import Layout, stored

from .bench import INT8, OURS
from .bench_sources import Matrix
from .candidates import Run, activations, dense, int8, packed
from .files import smallest
from .grid import named
from .machine import cache_bytes
from .table import decide
from .timing import quiet

LONG = 2.0
"""Seconds of a turn from which fewer turns are taken."""
FEWEST = 3
DENSE = (torch.float32, torch.bfloat16)
"""What is compared with, whatever the dtype of the target."""
Seconds = dict[str, list[float]]
"""For each candidate, the seconds of each turn."""
Runs = dict[str, list[tuple[Run, torch.dtype]]]
"""For each candidate, a product for each matrix, and the dtype of the activations that it takes."""


@dataclass
class Laid:
    """A matrix as it would lie packed, and what every candidate took, for each number of rows."""

    matrix: Matrix
    density: float
    layout: Layout | None
    why: str
    dense_bytes: int
    held_bytes: int
    packed_bytes: int
    seconds: dict[int, Seconds] = field(default_factory=dict)


def measure(
    matrices: Sequence[Matrix], rows: Sequence[int], turns: int, tell: Callable[[int, str], None]
) -> Iterator[Laid]:
    """Lays each matrix out as packing would by the table in use, and times it."""
    done = 0
    for chunk in _chunks(matrices):
        tell(done, chunk[0].name)
        laid, runs = _candidates(chunk)
        for n in rows:
            _time(laid, runs, n, turns)
        done += len(chunk)
        yield from laid


def _chunks(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    chunks: list[list[Matrix]] = [[]]
    full, held = 2 * cache_bytes(), 0
    for m in matrices:
        if held >= full:
            chunks.append([])
            held = 0
        chunks[-1].append(m)
        held += 4 * m.shape[0] * m.shape[1]
    if len(chunks) > 1 and held < full:  # what is left would run from the cache, unlike the others
        rest = chunks.pop()
        chunks[-1] += rest
    return chunks


def _candidates(chunk: Sequence[Matrix]) -> tuple[list[Laid], Runs]:
    laid: list[Laid] = []
    runs: Runs = {}
    for m in chunk:
        weight = m.load()
        density = float(stored(weight).double().mean())
        layout, why = decide(*m.shape, density, m.dtype) if m.layout is None else (m.layout, "it is packed already")
        parts = None if layout is None else m.parts(layout)
        held = weight.nbytes if parts is None else sum(p.nbytes for p in parts)
        laid.append(Laid(m, density, layout, why, weight.nbytes, held, smallest(weight)[0].nbytes))
        if layout is None or parts is None:
            runs.setdefault(OURS, []).append((dense(weight), m.dtype))
        else:
            runs.setdefault(OURS, []).append((packed(parts, layout, m.shape[1]), m.dtype))
        for dtype in DENSE:
            runs.setdefault(named(dtype), []).append((dense(weight.to(dtype, copy=True)), dtype))
        if (run := int8(weight)) is not None:
            runs.setdefault(INT8, []).append((run, torch.float32))
    return laid, runs


def _time(laid: Sequence[Laid], runs: Runs, rows: int, turns: int) -> None:
    """Adds what every candidate takes for every matrix; the first turn warms up."""
    columns = {m.matrix.shape[1] for m in laid}
    dtypes = {dtype for each in runs.values() for _, dtype in each}
    x = {(n, dtype): activations(rows, n, dtype) for n in columns for dtype in dtypes}
    for each in laid:
        each.seconds[rows] = {name: [] for name in runs}
    with quiet():
        start = perf_counter()
        for turn in range(turns + 1):
            first = turn % len(
                runs
            )  # who goes first finds the cache as another left it, so they take turns in that too
            for name in (*runs, *runs)[first : first + len(runs)]:
                for one, (run, dtype) in zip(laid, runs[name], strict=True):
                    given = x[one.matrix.shape[1], dtype]
                    begin = perf_counter()
                    run(given)
                    took = perf_counter() - begin
                    if turn:
                        one.seconds[rows][name].append(took)
            if turn >= FEWEST and perf_counter() - start > LONG * (turn + 1):
                break
