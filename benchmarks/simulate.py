"""What pruning a checkpoint of any size moves and takes: ``python -m benchmarks.simulate --tb 1 --machines 1 8 64``.

Arithmetic on a few constants, measured by `benchmarks.checkpoint` on one machine, and on what the code does: how often weights
are read, which sums are made. A test compares the latter with runs. Nothing is taken to overlap, so that times are upper bounds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.result import Result, Table

WAYS = ("global", "uniform", "lamp", "2:4")
DIGITS = {2: (1 << 15,), 4: (1 << 16, 1 << 15)}
"""Bins of each digit of a key, by the bytes of a weight: bf16 and fp32."""
KEPT = 128 << 20
"""Bytes of counts that a worker keeps between passes."""
COUNTS = {2: 15e3, 4: 222e3}
"""Bytes of counts of one large tensor of normal values."""
PASSES = {2: {"global": 1, "uniform": 1, "lamp": 2, "2:4": 1}, 4: {"global": 2, "uniform": 2, "lamp": 4, "2:4": 1}}
"""How often a plan reads all weights, apart from ties."""
UNKEPT = {2: {"global": 4, "uniform": 1, "lamp": 3, "2:4": 1}, 4: {"global": 7, "uniform": 2, "lamp": 5, "2:4": 1}}
"""The same of tensors whose counts are not kept, but for those of the one that was looked at last."""


@dataclass(frozen=True)
class Model:
    """A checkpoint: tensors of one size, shards of one size."""

    tensors: int
    numel: int
    width: int
    files: int

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.tensors * self.numel * self.width


@dataclass(frozen=True)
class Site:
    """Machines, each with a worker: GB/s of its disk and of its processor, seconds to start; the network between them."""

    read: float = 2.3
    count: float = 6.4
    rewrite: float = 0.5
    start: float = 2.0
    latency: float = 1e-3
    network: float = 1.0


@dataclass(frozen=True)
class Cost:
    """What one way costs on so many machines: of the busiest, GB moved and seconds; of all, the sums."""

    files: int
    passes: float
    sums: int
    sum_bytes: int
    read: float
    written: float
    plan: float
    adding: float
    writing: float
    total: float


def sums(model: Model, way: str, ties: int, ranges: int = 0) -> tuple[int, int]:
    """How many sums the workers make of a plan, and the bytes that each worker gives to them.

    Args:
        model: the checkpoint.
        way: one of `WAYS`.
        ties: cuts that go through equal magnitudes.
        ranges: of LAMP on fp32, ranges that are looked at more closely: a few a tensor, more or less as the values are.
    """
    t, digits = model.tensors, DIGITS[model.width]
    key = [8 * bins for bins in digits]
    facts, measured = 16, 24  # zeros and non-finite ones; zeros, whether anything is left, and the smallest of it
    if way == "2:4":
        found = [24 * t, measured * t]
    elif way == "global":
        found = [facts * t, *key, 16 * t, measured * t]
    else:
        found = t * [facts, *key, 16, measured]
    if way == "lamp":
        found += [facts * t] + t * [8 * digits[0], 8]
        if model.width == 4:
            found += ranges * [16 << 15] + t * [8]
    found += ties * [16]
    return len(found), sum(found)


def ties_of(model: Model, way: str) -> int:
    """Cuts that go through equal magnitudes, of values that are normal: all of bf16, and of large tensors of fp32."""
    if way == "2:4" or (model.width == 4 and model.numel < 1 << 24):
        return 0
    return model.tensors if way == "uniform" else 1


def passes(model: Model, way: str, ties: int, workers: int = 1, kept: int = KEPT) -> float:
    """How often a plan reads all weights: what is kept is read less often, a cut through equal magnitudes more often."""
    own = math.ceil(model.tensors / workers)
    missing = 1 - min(1.0, kept / (own * COUNTS[model.width]))
    tied = ties / model.tensors
    held = PASSES[model.width][way] + tied  # at most: as far as the last of those that go
    lost = UNKEPT[model.width][way] + tied * (2 if way == "global" else 1)
    return held * (1 - missing) + lost * missing


def cost(model: Model, way: str, machines: int, site: Site) -> Cost:
    """What the busiest of the machines moves, and how long it takes."""
    ties = ties_of(model, way)
    files = math.ceil(model.files / machines)
    share = model.nbytes / model.files * files / 1e9
    often = passes(model, way, ties, machines)
    number, nbytes = sums(model, way, ties, ranges=4 * model.tensors) if machines > 1 else (0, 0)
    plan = often * share * (1 / site.read + 1 / site.count)
    adding = number * site.latency + 2 * nbytes / 1e9 / site.network  # there and back
    writing = share / site.read + share / site.rewrite
    return Cost(
        files, often, number, nbytes, (often + 1) * share, share, plan, adding, writing, site.start + plan + adding + writing
    )  # fmt: skip


def by_machines(model: Model, machines: Sequence[int], site: Site) -> Table:
    """The default way on more and more machines."""
    rows = []
    for m in machines:
        c = cost(model, "global", m, site)
        moved = f"{c.files}", f"{c.read:,.0f}", f"{c.written:,.0f}", f"{c.sums:,}"
        rows.append((f"{m}", *moved, *map(minutes, (c.plan, c.adding, c.writing, c.total))))
    took = "counting", "sums, time", "rewriting", "in all"
    heads = ("machines", "files of the busiest", "GB read", "GB written", "sums", *took)
    return Table(f"{words(model)}, global; of the busiest machine", heads, rows)


def by_way(models: Sequence[Model], machines: Sequence[int], site: Site) -> Table:
    """Every way, on all machines of the list."""
    rows = []
    for model in models:
        for way in WAYS:
            each = [cost(model, way, m, site) for m in machines]
            last = each[-1]
            rows.append(
                (f"{words(model)}, {way}", f"{each[0].passes:.3g}", f"{last.passes:.3g}", f"{last.sums:,}",
                 f"{last.sum_bytes / (1 << 20):,.0f}", *(minutes(c.total) for c in each))
            )  # fmt: skip
    heads = ("<", f"passes to plan, on {machines[0]}", f"on {machines[-1]}", "sums", "MiB a worker adds")
    return Table("Ways", (*heads, *(f"in all, on {m}" for m in machines)), rows)


def words(model: Model) -> str:
    """A model in words."""
    dtype = {2: "bf16", 4: "fp32"}[model.width]
    return f"{model.nbytes / 1e12:.3g} TB {dtype}, {model.tensors:,} tensors, {model.files} files"


def minutes(seconds: float) -> str:
    """A time that is easy to read.

    >>> minutes(45.2), minutes(600), minutes(7260)
    ('45 s', '10.0 min', '2.02 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"


def simulated(tb: float, files: int, tensors: int, experts: int, machines: Sequence[int], site: Site) -> Result:
    """The tables."""

    def of(count: int, width: int) -> Model:
        return Model(count, int(tb * 1e12 / count / width), width, files)

    models = [of(tensors, 2), of(tensors, 4), of(experts, 2)]
    disk = f"a disk that reads {site.read:g} GB/s, {site.count:g} GB/s counted, {site.rewrite:g} GB/s rewritten"
    network = f"{site.latency * 1e3:g} ms a sum, {site.network:g} GB/s of network"
    tables = [by_machines(models[0], machines, site), by_way(models, machines, site)]
    return Result("simulate", "python -m benchmarks.simulate", f"machines with {disk}, {network}", tables)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what a checkpoint of a size takes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=main.__doc__)
    parser.add_argument("--tb", type=float, default=1.0, help="TB (10^12 bytes) of weights (%(default)s)")
    parser.add_argument("--files", type=int, default=200, help="shards (%(default)s)")
    parser.add_argument("--tensors", type=int, default=900, help="tensors of a dense model (%(default)s)")
    parser.add_argument("--experts", type=int, default=70_000, help="tensors of a mixture of experts (%(default)s)")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 8, 64])
    for name, what in (
        ("read", "GB/s of a disk"),
        ("count", "GB/s that are counted"),
        ("rewrite", "GB/s that are rewritten, from the page cache"),
        ("start", "seconds to start"),
        ("latency", "seconds that a sum takes, however small"),
        ("network", "GB/s of the network"),
    ):
        parser.add_argument(f"--{name}", type=float, default=getattr(Site, name), help=f"{what} (%(default)s)")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/scale.md")
    o = parser.parse_args(arguments)
    site = Site(o.read, o.count, o.rewrite, o.start, o.latency, o.network)
    result = simulated(o.tb, o.files, o.tensors, o.experts, o.machines, site)
    result.show(Console(width=170))
    if o.docs:
        from benchmarks.__main__ import DOCS, quote

        quote(result, Path(DOCS) / "scale.md")


if __name__ == "__main__":
    main()
