"""What ``import secateur`` adds to ``import torch``, from pairs of fresh processes."""

from __future__ import annotations

import statistics

from benchmarks import child, machine
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import spread

MOST_SECONDS = 0.3
_CODE = """
import json, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
{}
end = time.perf_counter()
print(json.dumps([end - start, end - middle]))
"""


def run(full: bool) -> Result:
    """Measures everything this page is about."""
    before = machine.load()
    repeats = 15 if full else 5
    child.script(_CODE.format("import secateur"))  # once, uncounted: bytecode and disk caches
    alone, both, after = [], [], []
    for _ in range(repeats):
        alone.append(child.script(_CODE.format(""))[0])
        total, added = child.script(_CODE.format("import secateur"))
        both.append(total)
        after.append(added)
    paired = [b - a for a, b in zip(alone, both, strict=True)]
    rows = [
        ("import torch", spread(alone)),
        ("import torch, secateur", spread(both)),
        ("difference, pair by pair", spread(paired)),
        ("import secateur where torch is there", spread(after)),
    ]
    table = Table(f"Seconds, {repeats} pairs of processes: median (min–max)", ("<", "s"), rows)
    bars = [
        Bar("import secateur where torch is there", statistics.median(after), MOST_SECONDS, unit=" s"),
        Bar("difference, pair by pair", statistics.median(paired), MOST_SECONDS, unit=" s"),
    ]
    command = f"python -m benchmarks import_time{' --full' if full else ''}"
    return Result("import_time", command, machine.machine(before), [table], bars)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["import_time"])
