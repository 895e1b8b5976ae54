"""Time against size: bf16 weights from one million to, with ``--full``, one thousand million."""

from __future__ import annotations

import torch

from benchmarks import machine
from benchmarks.models import encoder, weights_of, width_for
from benchmarks.result import Bar, Result, Table
from benchmarks.speed import READ, WAYS, timed
from benchmarks.timing import spread

SIZES = (1_000_000, 10_000_000, 100_000_000)
LARGE = (300_000_000, 1_000_000_000)
MOST_DRIFT = 1.5
"""How much more a weight of the largest model may cost than one of a hundred million."""


def run(full: bool, repeats: int = 5) -> Result:
    """Measures everything this page is about."""
    before = machine.load()
    rows, costs, left_out = [], {}, []
    for size in (*SIZES, *(LARGE if full else ())):
        width = width_for(size)
        need = 3 * 2 * weights_of(width)  # the weights, a copy of their dense values, and room
        free = machine.available_bytes()
        if free is not None and free < need:
            left_out.append(f"{size / 1e6:.0f} M (needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free)")
            continue
        times = timed(encoder(width, torch.bfloat16), WAYS, repeats)
        n = weights_of(width)
        ns = {name: 1e9 * t.median / n for name, t in times.items()}
        costs[size] = ns["global"]
        rows.append(
            (f"{n / 1e6:,.1f} M", times[READ].milliseconds(), times["global"].milliseconds(),
             spread(times["global"].per(times[READ])), *(f"{ns[w]:.2f}" for w in (READ, *WAYS)))
        )  # fmt: skip
    heads = ("bf16 weights", "read pass, ms", "global, ms", "× the read pass", "ns a weight: read", *WAYS)
    title = f"110 tensors, {repeats} turns: median (min–max)"
    if left_out:
        title += f"; left out for want of memory: {', '.join(left_out)}"
    bars = []
    if max(costs) > SIZES[-1]:
        drift = costs[max(costs)] / costs[SIZES[-1]]
        bars = [Bar(f"a weight of {max(costs) / 1e6:.0f} M costs, of 100 M = 1", drift, MOST_DRIFT)]
    command = f"python -m benchmarks scaling{' --full' if full else ''}"
    return Result("scaling", command, machine.machine(before), [Table(title, heads, rows)], bars)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["scaling"])
