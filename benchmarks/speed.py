"""Speed of pruning, as multiples of one read of the weights and of `torch.nn.utils.prune`, within one run.

``python -m benchmarks speed`` compares with torch on a model of a tenth the size; ``--full`` on the whole one, which takes
torch about 40 s and twelve times the weights' memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import secateur
from benchmarks import child, machine
from benchmarks.models import FULL_WIDTH, QUICK_WIDTH, encoder, fill, weights_of
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import Timing, spread, take_turns
from secateur import native
from secateur.core.make import make
from secateur.core.request import Request
from secateur.core.write import write_rows
from secateur.stores.base import matches
from secateur.stores.memory import MemoryStore

SPARSITY = 0.9
WAYS: dict[str, dict[str, Any]] = {
    "global": {"sparsity": SPARSITY},
    "uniform": {"sparsity": SPARSITY, "allocation": "uniform"},
    "2:4": {"pattern": "2:4"},
    "LAMP": {"sparsity": SPARSITY, "allocation": "lamp"},
}
DTYPES = ("float32", "bfloat16")
READ = "read pass"
MOST_READS = {"global": 3.0, "uniform": 3.0, "2:4": 3.0, "LAMP": 9.0}
LEAST_TIMES_FASTER = {"global": 200.0, "uniform": 200.0, "2:4": 200.0, "LAMP": 200.0 / 3}


BARE = "{}, selection and zeroing"


def bare(store: MemoryStore, way: dict[str, Any]) -> None:
    """The core of a call of `secateur.prune`: which weights go, and zeros over them; no names, checks or report."""
    specs = {s.name: s for s in store.specs()}
    made = make(store.specs(), store.parts, Request.of(**way), matches, store.sum)
    write_rows(made, store.parts, store.sum, lambda name: list(store.parts(specs[name], "whole")), store.write)


def read(model: nn.Module) -> None:
    """One native read pass over the weights: what selecting anything costs at least."""
    for p in model.parameters():
        native.scan(p.detach())


def timed(model: nn.Module, ways: dict[str, dict[str, Any]], repeats: int, cores: bool = False) -> dict[str, Timing]:
    """Times the read pass, whole calls of `secateur.prune`, and their core alone if asked, each on dense weights."""
    dense = [p.detach().clone() for p in model.parameters()]

    def restore() -> None:
        with torch.no_grad():
            for p, d in zip(model.parameters(), dense, strict=True):
                p.copy_(d)

    runs: dict[str, Callable[[], object]] = {READ: partial(read, model)}
    runs |= {name: partial(secateur.prune, model, **way) for name, way in ways.items()}
    if cores:
        runs |= {BARE.format(name): partial(bare, MemoryStore(model), way) for name, way in ways.items()}
    return take_turns(runs, restore, repeats)


def torch_once(width: int, dtype: str, repeats: int) -> dict[str, Any]:
    """In a child: `secateur.prune` a few times, then torch's global pruning once, of the same model and values."""
    model = encoder(width, getattr(torch, dtype))
    ours: dict[str, list[float]] = {}
    for _ in range(repeats + 1):
        for name, way in WAYS.items():
            fill(model)
            start = time.perf_counter()
            secateur.prune(model, **way)
            ours.setdefault(name, []).append(time.perf_counter() - start)
    fill(model)
    pairs = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]
    held = machine.held_bytes()
    start = time.perf_counter()
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=SPARSITY)
    seconds = time.perf_counter() - start
    weights = sum(m.weight.numel() * m.weight.element_size() for m, _ in pairs)
    return {
        "torch": seconds, "torch_extra": (machine.peak_bytes() - held) / weights,
        "ours": {name: s[1:] for name, s in ours.items()},
    }  # fmt: skip


@cache
def against_torch(width: int, dtype: str) -> dict[str, Any]:
    """`torch_once`, in a child, once for all benchmarks of a run."""
    found: dict[str, Any] = child.call("benchmarks.speed", "torch_once", width=width, dtype=dtype, repeats=3)
    return found


def run(full: bool, repeats: int = 9) -> Result:
    """Measures everything this page is about."""
    before = machine.load()
    width = FULL_WIDTH if full else QUICK_WIDTH
    rows: list[tuple[str, ...]] = []
    bars = []
    for dtype in DTYPES:
        model = encoder(FULL_WIDTH, getattr(torch, dtype))
        times = timed(model, WAYS, repeats, cores=True)
        del model
        reads = times.pop(READ)
        rows.append(
            (f"{dtype}, {READ}", reads.milliseconds(), f"{1e9 * reads.median / weights_of(FULL_WIDTH):.2f}", "1", "1")
        )
        for name in WAYS:
            whole, core = times[name], times[BARE.format(name)].per(reads)
            ns = 1e9 * whole.median / weights_of(FULL_WIDTH)
            rows.append((f"{dtype}, {name}", whole.milliseconds(), f"{ns:.2f}", spread(whole.per(reads)), spread(core)))
            bars.append(Bar(f"{dtype}, {name}: read passes", statistics.median(core), MOST_READS[name]))
    size = f"{weights_of(FULL_WIDTH) / 1e6:.0f} M weights in 110 tensors, {SPARSITY:.0%}, {repeats} turns: median (min–max)"
    heads = ("<", "whole call, ms", "ns a weight", "× the read pass", "selection and zeroing alone, × the read pass")
    tables = [Table(size, heads, rows)]
    rows = []
    for dtype in DTYPES:
        found = against_torch(width, dtype)
        rows.append((f"{dtype}, torch's global_unstructured", f"{1e3 * found['torch']:.4g}", "1"))
        for name, seconds in found["ours"].items():
            faster = [found["torch"] / s for s in seconds]
            rows.append((f"{dtype}, {name}", Timing(tuple(seconds)).milliseconds(), spread(faster)))
            what = f"{dtype}, {name}: times faster than torch's, {weights_of(width) / 1e6:.0f} M weights"
            bars.append(Bar(what, statistics.median(faster), LEAST_TIMES_FASTER[name], at_least=True))
    size = f"Beside torch.nn.utils.prune, {weights_of(width) / 1e6:.0f} M weights in 110 tensors, torch's once"
    tables.append(Table(size, ("<", "ms", "times faster"), rows))
    command = f"python -m benchmarks speed{' --full' if full else ''}"
    return Result("speed", command, machine.machine(before), tables, bars)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["speed"])
