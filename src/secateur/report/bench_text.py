"""What was measured of a target, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from . import bench_words
from .tables import MOST_ROWS, printed
from .words import counted, printable, share

if TYPE_CHECKING:
    from secateur.runtime.bench import Bench
    from secateur.runtime.bench_model import Whole

OURS = "packed"
NAMES = {OURS: "packed", "int8": "int8 (dynamic)"}


def renderables(b: Bench) -> Iterator[RenderableType]:
    """The parts of a report, in order: the machine, the layers, the bytes, the totals, and what they come to."""
    yield Text(f"{printable(b.target)}, on {b.machine}, last-level cache {size(b.cache_bytes)}", style="bold")
    yield _layers(b)
    for line in _bytes(b):
        yield Text(line)
    yield Text("Sum of the linear layers, one after another; not end to end", style="bold")
    yield _totals(b)
    if b.whole is not None:
        yield Text("The whole model, end to end", style="bold")
        yield _whole(b.whole)
    for said in bench_words.sentences(b):
        yield Text(said)


def _layers(b: Bench) -> Table:
    table = _table()
    table.add_column("layer", overflow="fold")
    for head in ("shape", "not zero", "layout", "bits"):
        table.add_column(head, justify="left" if head == "layout" else "right", no_wrap=True)
    rows = [t.rows for t in b.totals]
    for n in rows:
        table.add_column(Text(f"{n} row{'s' * (n > 1)}, µs"), justify="right", no_wrap=True)
        table.add_column(Text("fp32, bf16, int8"), justify="right", no_wrap=True)
    for layer in b.layers[:MOST_ROWS]:
        bits = 8 * layer.held_bytes / (layer.shape[0] * layer.shape[1])
        cells = []
        for n in rows:
            found = layer.seconds[n]
            others = [found[c] / found[OURS] if c in found else None for c in ("float32", "bfloat16", "int8")]
            cells += [f"{1e6 * found[OURS]:.0f}", " ".join("n/a" if o is None else f"{o:.2f}x" for o in others)]
        shape = "x".join(map(str, layer.shape))
        table.add_row(
            Text(printable(layer.name)), shape, share(layer.density), layer.layout or "dense", f"{bits:.2f}", *cells
        )
    if len(b.layers) > MOST_ROWS:
        table.add_row(f"… and {len(b.layers) - MOST_ROWS} more (to_json() has all)")
    return table


def _totals(b: Bench) -> Table:
    table = _table()
    for head in ("rows", "", "ms", "rows a second", "times as long as packed"):
        table.add_column(head, justify="left" if head == "" else "right", no_wrap=True)
    for t in b.totals:
        for name, seconds in t.seconds.items():
            ratio = "" if name == OURS else str(t.ratios[name])
            first = str(t.rows) if name == OURS else ""
            table.add_row(first, _label(name, t.faster), f"{1e3 * seconds:.3f}", f"{t.throughput[name]:,.0f}", ratio)
    return table


def _whole(w: Whole) -> Table:
    table = _table()
    table.add_column("")
    for head in ("ms", "times as long as packed", "outside its linear layers", "tensors"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, seconds in w.seconds.items():
        ratio = "" if name == OURS else str(w.ratios[name])
        table.add_row(
            _label(name, w.faster), f"{1e3 * seconds:.3f}", ratio, share(w.outside[name], 0), size(w.bytes[name])
        )
    return table


def _label(name: str, faster: str) -> str:
    return NAMES.get(name, f"dense {name}") + (", the faster dense one" if name == faster else "")


def _bytes(b: Bench) -> Iterator[str]:
    layers = f"weights of {counted(len(b.layers), 'layer')}"
    if b.file_bytes is not None:
        held = sum(layer.file_bytes or 0 for layer in b.layers)
        yield f"file: {size(b.file_bytes)}, of which {layers}: {size(held)}, {8 * held / b.weights:.2f} bits a weight"
    yield (
        f"{layers} in a packed file, no codec: {size(b.packed_bytes)}, {8 * b.packed_bytes / b.weights:.2f} bits a weight"
    )
    yield (f"{layers} in memory: {size(b.dense_bytes)} dense, {size(b.held_bytes)} packed, {b.bits:.2f} bits a weight")
    if b.memory is not None:
        yield (
            f"memory of a process that holds all tensors, measured: {size(b.memory.dense)} dense, "
            f"{size(b.memory.packed)} packed"
        )


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="bold")


def size(n: float) -> str:
    """Bytes with three digits.

    >>> size(999), size(33_554_432), size(1.5e9)
    ('999 B', '33.6 MB', '1.50 GB')
    """
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= step:
            return f"{n / step:.3g} {unit}" if n / step >= 10 else f"{n / step:.2f} {unit}"
    return f"{n:.0f} B"


def as_text(b: Bench, width: int = 160) -> str:
    """The report as plain text."""
    return printed(renderables(b), width)
