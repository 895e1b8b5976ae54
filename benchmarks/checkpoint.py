"""A sharded checkpoint on disk: pruning it beside reading it once and copying it, on to the disk; and what memory that takes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks import checkpoint_chart, child, machine
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import Timing, spread

QUICK = (0.05,)
SIZES = {False: (0.25, 0.5), True: (0.5, 2.0, 6.0, 12.0)}
"""GB (10^9 bytes) of the quick form, of the moderate one, and of the full one."""
SHARD, ROWS = 0.5, 4096
ROOM = 2.2
"""Times its size that a checkpoint needs of the disk: itself, one result beside it, and some to spare."""
SETTLE = 3.0
"""Seconds of rest before each candidate. A virtual machine gives memory that was freed back to its host after two, and takes it
again several times more slowly than its own: whoever came first after the last result was removed would get it for nothing."""
LARGE = 1.0
"""GB from which on times have bars: below, much of the time is the start of Python and torch."""
MOST = {"warm": 2.0, "cold": 1.4}
MOST_MIB, MOST_GROWTH, LEAST_FASTER = 300.0, 1.1, 1.5
READ, COPY, PLAN, PRUNE = "cat", "cp, sync", "plan", "prune"
COPY2, PRUNE2 = "cat, cp, sync by 2", "prune --jobs 2"
NAMES = (READ, COPY, PLAN, PRUNE, COPY2, PRUNE2)
IDLE = """
import json, torch
line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM:"))
print(json.dumps(int(line.split()[1]) * 1024))
"""


@dataclass(frozen=True)
class Cell:
    """One size: seconds of each candidate by the state of the cache, and memory beyond an idle process, in MiB."""

    gb: float
    shards: int
    times: Mapping[str, Mapping[str, Timing]]
    serial: list[float]
    worker: list[float]

    def ratio(self, cache: str) -> list[float]:
        """Pruning, as a multiple of reading once, copying and syncing; turn by turn."""
        t = self.times[cache]
        return [a / b for a, b in zip(t[PRUNE].seconds, self._raw(cache), strict=True)]

    def faster(self, cache: str) -> tuple[list[float], list[float]]:
        """How many times faster two processes are than one: at pruning, and at reading, copying and syncing."""
        t = self.times[cache]
        disk = [a / b for a, b in zip(self._raw(cache), t[COPY2].seconds, strict=True)]
        return t[PRUNE].per(t[PRUNE2]), disk

    def _raw(self, cache: str) -> list[float]:
        t = self.times[cache]
        return [a + b for a, b in zip(t[READ].seconds, t[COPY].seconds, strict=True)]


def make(folder: Path, gb: float) -> int:
    """Writes a bf16 checkpoint of about so many GB as shards with an index; returns how many shards."""
    shards = max(4, round(gb / SHARD))
    columns = max(1, int(gb * 1e9) // (shards * 4 * ROWS * 2 * 4)) * 4  # so that groups of four fit
    base = torch.randn(ROWS, columns).bfloat16()
    table: dict[str, str] = {}
    folder.mkdir()
    for i in range(shards):
        scales = [0.5 + 0.1 * ((4 * i + j) % 13) for j in range(4)]
        tensors = {f"model.layers.{i}.proj_{j}.weight": base * s for j, s in enumerate(scales)}
        tensors[f"model.layers.{i}.norm.weight"] = torch.ones(ROWS, dtype=torch.bfloat16)
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        table |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "none"}', encoding="utf-8")
    return shards


def command(arguments: list[str]) -> dict[str, int]:
    """In a child: runs the command line; says the most memory this process held, and the largest of its workers."""
    import resource

    from secateur.cli import main

    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as e:
        if e.code:
            raise RuntimeError(f"secateur {' '.join(arguments)} ended with {e.code}") from e
    return {"own": machine.peak_bytes(), "workers": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache, once they are on disk."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class Work:
    """The candidates over one checkpoint, and the peaks of the processes that pruned."""

    def __init__(self, folder: Path, settle: float) -> None:
        self.source, self.out, self.settle = folder / "source", folder / "out", settle
        self.peaks: dict[str, list[int]] = {PRUNE: [], PRUNE2: []}

    def candidates(self) -> dict[str, Callable[[], None]]:
        """What takes turns, by name."""
        shards = sorted(self.source.glob("*.safetensors"))
        copied = 'cat "$@" > /dev/null; mkdir -p "$0"; cp "$@" "$0"; sync "$0"/* "$0"'
        halves: list[list[str | Path]] = [[copied, f"{self.out}/{i}", *shards[i::2]] for i in (0, 1)]
        return {
            READ: lambda: shells([['cat "$@" > /dev/null', "sh", *shards]]),
            COPY: lambda: shells([['cp -r "$0" "$1"; sync "$1"/* "$1"', self.source, self.out]]),
            PLAN: lambda: self._run(PLAN, "plan", "-o", f"{self.out}/plan.json"),
            PRUNE: lambda: self._run(PRUNE, "prune", "-o", f"{self.out}/pruned"),
            COPY2: lambda: shells(halves),
            PRUNE2: lambda: self._run(PRUNE2, "prune", "--jobs", "2", "-o", f"{self.out}/pruned"),
        }

    def _run(self, name: str, verb: str, *more: str) -> None:
        self.out.mkdir()
        arguments = [verb, str(self.source), "--sparsity", "0.5", *more]
        found = child.call("benchmarks.checkpoint", "command", arguments=arguments)
        if name in self.peaks:
            self.peaks[name].append(found["own" if name == PRUNE else "workers"])

    def ready(self, cache: str) -> None:
        """What is not timed: the last result goes, and the source is in the page cache, or is not."""
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()
        if cache == "cold":
            forget(self.source)
        else:
            shells([['cat "$0"/* > /dev/null', self.source]])
        time.sleep(self.settle)


def shells(lines: Sequence[Sequence[str | Path]]) -> None:
    """Runs lines of shell beside each other, each with its arguments.

    Raises:
        RuntimeError: one failed.
    """
    running = [subprocess.Popen(["sh", "-ec", *map(str, line)]) for line in lines]
    if any([p.wait() for p in running]):
        raise RuntimeError(f"a line of shell failed: {lines[0][0]}")


def turns(work: Work, cache: str, repeats: int) -> dict[str, Timing]:
    """Times all candidates in turns. None is run beforehand: files of many GB would be moved for nothing."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    candidates = work.candidates()
    for _ in range(repeats):
        for name in NAMES:
            work.ready(cache)
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
            print(f"{cache}, {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    work.ready(cache)
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def measured(gb: float, folder: Path, repeats: int, idle: int, settle: float) -> Cell:
    """One size, in a new folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-") as name:
        work = Work(Path(name), settle)
        shards = make(work.source, gb)
        times = {cache: turns(work, cache, repeats) for cache in MOST}
    serial, worker = ([(p - idle) / (1 << 20) for p in work.peaks[n]] for n in (PRUNE, PRUNE2))
    return Cell(gb, shards, times, serial, worker)


def bars_of(cells: Sequence[Cell]) -> list[Bar]:
    """The bars that these sizes reach or miss."""
    bars = []
    for c in (c for c in cells if c.gb >= LARGE):
        for cache, most in MOST.items():
            found = statistics.median(c.ratio(cache))
            bars.append(Bar(f"{c.gb:g} GB, {cache}: prune, of cat + cp + sync", found, most, unit=" ×"))
        for cache in MOST:
            ours, disk = map(statistics.median, c.faster(cache))
            what = f"{c.gb:g} GB, {cache}: times faster with 2 processes (the disk: {disk:.2g})"
            bars.append(Bar(what, ours, min(LEAST_FASTER, disk), at_least=True, unit=" ×"))
    bars += [Bar(f"{c.gb:g} GB: memory beyond an idle process", max(c.serial), MOST_MIB, unit=" MiB") for c in cells]
    large = [c for c in cells if c.gb >= LARGE] or list(cells)
    low, high = (statistics.median(c.serial) for c in (large[0], large[-1]))
    if len(large) > 1:
        bars.append(Bar(f"memory of {large[-1].gb:g} GB, {large[0].gb:g} GB = 1", high / low, MOST_GROWTH))
    return bars


def tables_of(cells: Sequence[Cell], title: str, start: Timing, idle: int) -> list[Table]:
    """Times, ratios, and memory."""
    seconds, ratios = [], []
    for c in cells:
        for cache, t in c.times.items():
            seconds.append((f"{c.gb:g} GB, {c.shards} shards", cache, *(spread(list(t[n].seconds)) for n in NAMES)))
            ours, disk = c.faster(cache)
            ratios.append((f"{c.gb:g} GB", cache, *map(spread, (c.ratio(cache), ours, disk))))
    memory = [(f"{c.gb:g} GB", spread(c.serial), spread(c.worker)) for c in cells]
    begin = f"; to start the command line alone takes {spread(list(start.seconds))} s of each plan and prune"
    two = "prune: 2 processes, times faster", "cat, cp, sync: 2 processes, times faster"
    beyond = f"Peak memory beyond an idle Python with torch ({idle >> 20} MiB), MiB"
    return [
        Table(f"Seconds, {title}{begin}", ("<bf16 weights", "<page cache", *NAMES), seconds),
        Table("Ratios within turns", ("<", "<", "prune, of cat + cp + sync", *two), ratios),
        Table(beyond, ("<", "prune", "a worker of --jobs 2, at most"), memory),
    ]


def run(full: bool, quick: bool = False, sizes: Sequence[float] = (), repeats: int = 0) -> Result:
    """Measures everything this page is about.

    Args:
        full: whole sizes, three turns.
        quick: does it run?
        sizes: these instead, in GB.
        repeats: turns, where it is said.
    """
    before, repeats = machine.load(), repeats or (3 if full else 1)
    asked = tuple(sizes) or (QUICK if quick else SIZES[full])
    folder = Path(__file__).parents[1] / "runs"
    folder.mkdir(exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    left_out = [f"{gb:g} GB (needs {ROOM * gb:.0f} GB of disk)" for gb in asked if ROOM * gb + 2 > free]
    idle = int(statistics.median([child.script(IDLE) for _ in range(3)]))
    start = Timing(tuple(_start() for _ in range(repeats)))
    cells = [measured(gb, folder, repeats, idle, 0.0 if quick else SETTLE) for gb in asked if ROOM * gb + 2 <= free]
    title = f"{repeats} turns: median (min–max)" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    more = " --quick" if quick else " --full" if full else ""
    line = f"python -m benchmarks checkpoint{more}"
    if sizes:
        line = f"python -m benchmarks.checkpoint {' '.join(f'{s:g}' for s in sizes)} --turns {repeats}"
    return Result("checkpoint", line, machine.machine(before), tables_of(cells, title, start, idle), bars_of(cells))


def _start() -> float:
    begin = time.perf_counter()
    child.call("benchmarks.checkpoint", "command", arguments=["--version"])
    return time.perf_counter() - begin


def main() -> None:
    """Measures the sizes that are named, in GB: ``python -m benchmarks.checkpoint 2 6``."""
    from benchmarks.__main__ import DOCS, quote

    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=main.__doc__)
    parser.add_argument(
        "sizes", nargs="+", type=float, help="GB; three times as much disk is needed, one size at a time"
    )
    parser.add_argument("--turns", type=int, default=3, help="how often each is timed (%(default)s)")
    parser.add_argument("--docs", action="store_true", help="put the tables and the picture into docs/")
    options = parser.parse_args()
    result = run(False, sizes=options.sizes, repeats=options.turns)
    result.show(Console(width=170))
    result.write(Path("runs/bench"))
    if options.docs:
        quote(result, DOCS / "scale.md")
        checkpoint_chart.write(result, DOCS / "scale.svg")


if __name__ == "__main__":
    main()
