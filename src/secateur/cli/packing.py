"""``secateur pack`` and ``secateur unpack``: files in which zeros take next to no room, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.report.tables import MOST_ROWS
from secateur.report.words import printable
from secateur.runtime.facts import PackedReport, PackedRow
from secateur.runtime.files import save_packed, unpack_file

from .output import show
from .pickled import as_files
from .progress import watched

Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes; must not exist.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]


def pack_command(
    src: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder with one or with shards and an index.")],
    out: Out,
    codec: Annotated[
        str | None, typer.Option(help="zstd: compressed without loss as well; unpacking then needs zstandard.")
    ] = None,
    overwrite: Overwrite = False,
    json: AsJson = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a .bin or .pt file, with torch.load(weights_only=True).")
    ] = False,
) -> None:
    """Write a pruned checkpoint so that its zeros take next to no room; unpack gives every bit back."""
    with as_files(src, allow_pickle) as target, watched(f"packing {src.name}"):
        report = save_packed(target, out, codec=codec, overwrite=overwrite)
    show(report.to_json() if json else list(renderables(report)))


def unpack_command(
    src: Annotated[Path, typer.Argument(help="What pack wrote: a file, or a folder.")],
    out: Out,
    overwrite: Overwrite = False,
    json: AsJson = False,
) -> None:
    """Turn what pack wrote into plain safetensors again: the same tensors, bit by bit."""
    with watched(f"unpacking {src.name}"):
        report = unpack_file(src, out, overwrite=overwrite)
    show(report.to_json() if json else list(renderables(report)))


def renderables(report: PackedReport) -> Iterator[RenderableType]:
    """The parts of a report, in order: the packed tensors, the totals, what the rest takes, where it lies."""
    if report.packed:
        yield _table(report.packed)
    yield Text(str(report), style="bold")
    plain = [r for r in report.rows if r.plain]
    if report.packed and plain:
        size = sum(r.packed_bytes for r in plain)
        yield Text(f"plain: {len(plain)} tensors, {size:,} bytes, {size / report.packed_bytes:.1%} of what is packed")
    yield Text(f"written to {report.out}")


def _table(rows: tuple[PackedRow, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    for name in ("shape", "dtype", "encoding", "dense, bytes", "packed, bytes", "smaller", "bits a weight"):
        table.add_column(name, justify="left" if name == "encoding" else "right", no_wrap=True)
    for r in rows[:MOST_ROWS]:
        way = r.encoding if r.codec is None else f"{r.encoding} + {r.codec}"
        table.add_row(
            Text(printable(r.name)), "x".join(map(str, r.shape)) or "scalar", r.dtype, way, f"{r.dense_bytes:,}",
            f"{r.packed_bytes:,}", f"{r.dense_bytes / r.packed_bytes:.2f}x", f"{r.bits_per_weight:.2f}",
        )  # fmt: skip
    if len(rows) > MOST_ROWS:
        table.add_row(f"… and {len(rows) - MOST_ROWS} more (--json has all)", *[""] * 7)
    return table
