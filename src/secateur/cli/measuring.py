"""``secateur bench`` and ``secateur tune``: what packing does on this machine, measured while it is waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as RichTable
from rich.text import Text

from secateur.errors import BadInput, OutputExists

from .output import show
from .progress import counted

if TYPE_CHECKING:
    from secateur.runtime.grid import Grid
    from secateur.runtime.table import Table

Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; as many as torch takes by default.")]


def bench_command(
    path: Annotated[Path, typer.Argument(help="A file or folder of weights, packed or plain safetensors.")],
    rows: Annotated[str, typer.Option(help="Numbers of rows of the activations.")] = "1,16,128",
    threads: Threads = None,
    table: Annotated[Path | None, typer.Option(help="A table of secateur tune.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure the memory that it takes, in a process of its own.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Measure bytes, memory and speed of its linear layers, packed and dense, on this machine."""
    from secateur.report.bench_text import renderables
    from secateur.runtime.bench import bench  # for those who measure

    with _with_threads(threads), counted() as told:
        found = bench(path, rows=_numbers(rows), table=table, memory=memory, progress=told)
    show(found.to_json() if json else list(renderables(found)))


def tune_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the table goes; must not exist.")] = Path(
        "table.json"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds, not minutes; knows less, and so gains less.")
    ] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16; by default the first two; repeatable.")
    ] = None,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
) -> None:
    """Measure when packed matrices are faster than dense ones on this machine; SECATEUR_TABLE=PATH uses what it writes."""
    from secateur.runtime.tune import FULL, QUICK, tune  # for those who measure
    from secateur.stores.staging import staged

    if os.path.lexists(out) and not overwrite:  # before minutes are spent
        raise OutputExists(f"{str(out)!r} is already there; choose another path, or say --overwrite.")
    with _with_threads(threads), counted() as told:
        found = tune(dtypes=dtype or ("float32", "bfloat16"), size=QUICK if quick else FULL, progress=told)
    text = found.to_json()
    with staged(out, overwrite, len(text)) as stage:
        stage.write_text(text, encoding="utf-8")
    tables = [part for g in found.grids for part in (Text(f"{g.dtype}, {g.machine}", style="bold"), _choices(found, g))]
    show([*tables, f"written to {out}; SECATEUR_TABLE={out} uses it"])


def _choices(table: Table, grid: Grid) -> RichTable:
    """What square matrices get, and how many times as fast as dense it is at 1, 16 and 128 rows, at least."""
    from secateur.runtime.grid import NAMES
    from secateur.runtime.table import MATTER, choose

    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    shown.add_column("size", justify="right")
    for density in grid.densities:
        shown.add_column(f"{1 - density:.0%} zero", justify="right")
    for side in grid.out:
        cells = []
        for density in grid.densities:
            layout = choose(side, side, density, NAMES[grid.dtype], table)
            found = [grid.best(layout, side, side, density, n)[0] for n in MATTER] if layout else []
            cells.append(f"{layout} {' '.join(f'{r:.1f}' for r in found)}" if layout else "dense")
        shown.add_row(str(side), *cells)
    return shown


@contextmanager
def _with_threads(n: int | None) -> Iterator[None]:
    from secateur.runtime.timing import threads

    if n is None:
        yield
        return
    with threads(n):
        yield


def _numbers(text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise BadInput(f"--rows are whole numbers, such as 1,16,128; got {text!r}.") from None
