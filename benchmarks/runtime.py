"""Products with pruned matrices, packed and dense: how many times as fast, at how many rows, on how many threads.

``python -m benchmarks runtime`` measures the tables of issue size: four shapes, four sparsities, 1, 16 and 128 rows, one thread
and two. Candidates take turns in one process. Weights are cold: of each candidate there are so many copies, used one after
another, that together they do not fit into the last-level cache. A ratio is the median over the turns, with an interval that
holds the true median 19 times in 20. ``--quick`` asks whether it runs; its numbers say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks import machine, result, runtimes, tuned
from benchmarks.result import Bar, Result
from secateur.core.layouts import LAYOUTS, arrange
from secateur.native import products
from secateur.runtime.candidates import BY, Run, activations, copies_of, dense, packed, sparse
from secateur.runtime.grid import named
from secateur.runtime.table import LEAST, Table, active, choose, key, route, using
from secateur.runtime.timing import Ratio, Timing, quiet, take_turns, threads
from secateur.runtime.tune import FULL

BF16, F32 = torch.bfloat16, torch.float32
BASE, FLOAT = "torch bfloat16", "torch float32"
EXPANDED = "expanded"
SHAPE = (4096, 4096)
"""The shape that the goals are about."""
GATE = 0.9
"""Share of a goal that has to be reached."""
GOALS: Mapping[int, Mapping[float, tuple[float, float | None]]] = {
    1: {0.5: (1.85, 2.6), 0.8: (3.0, 4.2), 0.9: (4.0, 5.5), 0.95: (8.0, 11.0)},
    16: {0.5: (1.7, 6.4), 0.8: (2.5, 9.5), 0.9: (2.9, 10.8), 0.95: (4.6, 17.0)},
    128: {0.5: (1.5, 5.1), 0.8: (1.7, 5.6), 0.9: (1.9, 6.1), 0.95: (1.8, None)},
}
"""On a processor with AMX, by rows and sparsity: times as fast as torch's dense bfloat16, and float32."""
AVX2_GOALS = {0.5: 1.5, 0.8: 1.9, 0.9: 2.0}
"""On any other, with the kernels for AVX2, at 1 row: times as fast as torch's dense bfloat16."""
FLOAT_GOALS = {1: 3.0, 128: 3.5}
"""By rows, at 90 %: times as fast as torch's dense float32, in float32."""


@dataclass(frozen=True)
class Size:
    """What is measured."""

    shapes: tuple[tuple[int, int], ...] = (SHAPE, (3072, 768), (11008, 4096), (768, 768))
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    rows: tuple[int, ...] = (1, 16, 128)
    threads: tuple[int, ...] = (1, 2)
    turns: int = 9
    most_copies: int = 1024


WHOLE = Size()
THOROUGH = Size(turns=25)
QUICK = Size(((64, 128),), (0.5, 0.9), (1, 16), (1,), 3, 2)


@dataclass(frozen=True)
class Cell:
    """What was found at one point.

    Attributes:
        shape, sparsity, rows, threads: the point.
        times: of every candidate.
        used: dtype to the candidate that packing uses there, which may be the dense one.
    """

    shape: tuple[int, int]
    sparsity: float
    rows: int
    threads: int
    times: Mapping[str, Timing]
    used: Mapping[torch.dtype, str]

    def faster(self, ours: str, other: str) -> Ratio:
        """How many times as fast as the other."""
        return Ratio.of(self.times[other].per(self.times[ours]))


def torch_name(dtype: torch.dtype) -> str:
    """torch's dense product."""
    return f"torch {named(dtype)}"


def our_name(layout: str, dtype: torch.dtype, how: str = "") -> str:
    """A packed product: by the kernel, expanded, or by the kernel of another instruction set."""
    return f"{layout} {named(dtype)}" + (f", {how}" if how else "")


@dataclass(frozen=True)
class Way:
    """A layer in many copies, the dtype that it takes, and the table that names its route."""

    copies: Sequence[Run]
    dtype: torch.dtype
    table: Table | None = None

    def all(self, x: Tensor, isa: str | None = None) -> None:
        """Calls each copy once, by kernels of another instruction set if one is named."""
        before = products.isa()
        if isa is not None:
            products.use_isa(isa)
        with using(self.table or active()):
            for run in self.copies:
                run(x)
        products.use_isa(before)


class Candidates:
    """A matrix in all forms, in so many copies that they are cold."""

    def __init__(self, shape: tuple[int, int], sparsity: float, most_copies: int) -> None:
        self.shape, self.density = shape, 1 - sparsity
        self.weight = sparse(*shape, self.density, F32)
        self.copies = range(min(copies_of(2 * self.weight.numel()), most_copies))
        self.runs: dict[str, Way] = {}
        for dtype in (BF16, F32):
            weight = self.weight.to(dtype)
            self.runs[torch_name(dtype)] = Way([dense(weight.clone()) for _ in self.copies], dtype)
            for layout in LAYOUTS:
                laid = arrange(weight, layout)
                layers = [
                    packed((laid[0].clone(), laid[1].clone(), laid[2].clone()), layout, shape[1]) for _ in self.copies
                ]
                self.runs[our_name(layout, dtype)] = Way(layers, dtype, BY["kernel"])
                self.runs[our_name(layout, dtype, EXPANDED)] = Way(layers, dtype, BY["expand"])
        self.runs[runtimes.TORCH_CSR] = Way([runtimes.torch_csr(self.weight) for _ in self.copies], F32)

    def used(self, rows: int) -> dict[torch.dtype, str]:
        """For each dtype, what packing uses."""
        found = {}
        for dtype in (BF16, F32):
            layout = choose(*self.shape, self.density, dtype)
            found[dtype] = torch_name(dtype)
            if layout is not None:
                way = route(layout, rows, self.density, *self.shape, dtype)
                found[dtype] = our_name(layout, dtype, EXPANDED if way == "expand" else "")
        return found

    def measure(self, rows: int, n: int, turns: int, absent: Mapping[str, str]) -> Cell:
        """Times everything at one number of rows and threads."""
        x = {dtype: activations(rows, self.shape[1], dtype) for dtype in (BF16, F32)}
        used = self.used(rows)
        ways = {name: w for name, w in self.runs.items() if EXPANDED not in name or name in used.values()}
        ways |= self._others(rows, n, absent)
        passes = {name: partial(w.all, x[w.dtype]) for name, w in ways.items()}
        if "avx2" in products.isas():
            for layout in LAYOUTS:
                passes[our_name(layout, BF16, "avx2")] = partial(self.runs[our_name(layout, BF16)].all, x[BF16], "avx2")
        with quiet(), threads(n):
            times = take_turns(passes, turns)
        per_product = {name: Timing(tuple(s / len(self.copies) for s in t.seconds)) for name, t in times.items()}
        return Cell(self.shape, 1 - self.density, rows, n, per_product, used)

    def _others(self, rows: int, n: int, absent: Mapping[str, str]) -> dict[str, Way]:
        found = {}
        if runtimes.ORT not in absent:
            found[runtimes.ORT] = Way([runtimes.onnxruntime(self.weight, n) for _ in self.copies], F32)
        if runtimes.OPENVINO not in absent:
            made = [runtimes.openvino(self.weight, rows, n) for _ in self.copies]
            found[f"{runtimes.OPENVINO}, {made[0][1]}"] = Way([run for run, _ in made], F32)
        return found


def measured(size: Size) -> list[Cell]:
    """All cells."""
    absent, cells = runtimes.missing(), []
    for shape, sparsity in product(size.shapes, size.sparsities):
        candidates = Candidates(shape, sparsity, size.most_copies)
        cells += [candidates.measure(rows, n, size.turns, absent) for rows in size.rows for n in size.threads]
    return cells


def tables_of(cells: Sequence[Cell]) -> list[result.Table]:
    """A table for each shape and number of threads."""
    found = []
    for shape, n in dict.fromkeys((c.shape, c.threads) for c in cells):
        some = [c for c in cells if (c.shape, c.threads) == (shape, n)]
        names = list(dict.fromkeys(name for c in some for name in c.times if name not in (BASE, FLOAT)))
        names = [name for name in names if EXPANDED not in name]
        title = (
            f"{shape[0]}x{shape[1]}, {n} thread{'s' * (n > 1)}: milliseconds of dense; what packing uses, times as fast as "
            "dense of its dtype, with an interval; each candidate, times as fast as dense bfloat16 [float32]"
        )
        heads = ("<", "bfloat16, ms", "float32, ms", "<packed bfloat16", "<packed float32", *names)
        rows = [_row(c, names) for c in sorted(some, key=lambda c: (c.rows, c.sparsity))]
        found.append(result.Table(title, heads, rows))
    return found


def _row(c: Cell, names: Sequence[str]) -> tuple[str, ...]:
    def both(name: str) -> str:
        return f"{c.faster(name, BASE).median:.2f} [{c.faster(name, FLOAT).median:.2f}]" if name in c.times else ""

    def ours(dtype: torch.dtype) -> str:
        name = c.used[dtype]
        if name == torch_name(dtype):
            return "dense"
        label = name.removesuffix(f" {named(dtype)}")
        return f"{label.replace(f' {named(dtype)},', ',')} {c.faster(name, torch_name(dtype))}"

    what = f"{c.rows} row{'s' * (c.rows > 1)}, {c.sparsity:.0%}"
    return (
        what, f"{1e3 * c.times[BASE].median:.3g}", f"{1e3 * c.times[FLOAT].median:.3g}", ours(BF16), ours(F32),
        *(both(name) for name in names),
    )  # fmt: skip


def bars_of(cells: Sequence[Cell]) -> list[Bar]:
    """The goals for this processor; of one thread and several the worse counts."""
    at: dict[tuple[int, float], list[Cell]] = {}
    for c in cells:
        if c.shape == SHAPE:
            at.setdefault((c.rows, round(c.sparsity, 3)), []).append(c)
    bars = _amx_bars(at) if "+amx" in key(BF16) else _avx2_bars(at)
    for rows, goal in FLOAT_GOALS.items():
        if some := at.get((rows, 0.9)):
            least = min(c.faster(c.used[F32], FLOAT).median for c in some)
            bars.append(_bar(f"{rows} rows, 90%, float32: times dense float32", least, GATE * goal))
    used = [(c, c.faster(c.used[d], torch_name(d)).median) for c in cells for d in (BF16, F32)]
    bars.append(_bar("whatever is packed, at worst: times dense of its dtype", min(r for _, r in used), LEAST))
    bars += _others_bars(cells)
    return bars


def _amx_bars(at: Mapping[tuple[int, float], Sequence[Cell]]) -> list[Bar]:
    bars = []
    for rows, goals in GOALS.items():
        for sparsity, asked in goals.items():
            for other, goal in zip((BASE, FLOAT), asked, strict=True):
                if goal is not None and (some := at.get((rows, sparsity))):
                    least = min(c.faster(c.used[BF16], other).median for c in some)
                    bars.append(_bar(f"{rows} rows, {sparsity:.0%}, bfloat16: times {other}", least, GATE * goal))
    return bars


def _avx2_bars(at: Mapping[tuple[int, float], Sequence[Cell]]) -> list[Bar]:
    """Of the layouts the faster counts, as it does for packing where a table knows both."""
    names, bars = [our_name(layout, BF16, "avx2") for layout in LAYOUTS], []
    for sparsity, goal in AVX2_GOALS.items():
        some = [c for c in at.get((1, sparsity), ()) if names[0] in c.times]
        if some:
            least, by = max((min(c.faster(name, BASE).median for c in some), name) for name in names)
            bars.append(_bar(f"1 row, {sparsity:.0%}, by AVX2, {by.split()[0]}: times {BASE}", least, goal))
    return bars


def _others_bars(cells: Sequence[Cell]) -> list[Bar]:
    """At equal precision, what else is installed."""
    bars = []
    for rows in (1, 16):
        found = [
            c.faster(c.used[F32], other).median
            for c in cells if c.rows == rows for other in (FLOAT, runtimes.TORCH_CSR, runtimes.ORT) if other in c.times
        ]  # fmt: skip
        if found:
            bars.append(_bar(f"{rows} rows, float32, at worst: times the best of the others", min(found), LEAST))
    return bars


def _bar(what: str, found: float, limit: float) -> Bar:
    return Bar(what.replace("1 rows", "1 row"), found, limit, at_least=True)


def run(full: bool, quick: bool = False) -> Result:
    """Measures everything this page is about."""
    before = machine.load()
    with tuned.in_use(None if quick else FULL) as known:
        cells = measured(QUICK if quick else THOROUGH if full else WHOLE)
    skipped = [(name, f"{package} is not installed") for name, package in runtimes.missing().items()]
    tables = [known, *tables_of(cells)] + ([result.Table("Left out", ("<", "<"), skipped)] if skipped else [])
    command = f"python -m benchmarks runtime{' --quick' if quick else ' --full' if full else ''}"
    return Result("runtime", command, machine.machine(before), tables, [] if quick else bars_of(cells))


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["runtime"])
