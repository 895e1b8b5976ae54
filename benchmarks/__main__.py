"""Runs the benchmarks: ``python -m benchmarks [NAME ...] [--full] [--docs]``, and some with ``--quick``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import (
    checkpoint,
    checkpoint_chart,
    endtoend,
    export,
    import_time,
    memory,
    packed,
    probes,
    runtime,
    scaling,
    speed,
    train_step,
)
from benchmarks.result import Result

MODULES = (import_time, probes, speed, memory, scaling, train_step, packed, runtime, endtoend, export, checkpoint)
ALL = {m.__name__.rpartition(".")[2]: m for m in MODULES}
DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
QUICK = {"runtime": runtime.run, "endtoend": endtoend.run, "checkpoint": checkpoint.run}
"""Those that have a quick form."""
PAGES = dict.fromkeys(("runtime", "endtoend"), DOCS / "faster.md") | {
    "export": DOCS / "export.md",
    "checkpoint": DOCS / "scale.md",
}
"""Where the tables of a benchmark belong that are not on `PAGE`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints tables, and writes ``<name>.json`` and ``<name>.md`` into the output folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(ALL)}; all if none is given")
    parser.add_argument("--full", action="store_true", help="whole sizes: minutes, and up to 6 GB of memory")
    parser.add_argument("--quick", action="store_true", help=f"does it run? Of {', '.join(QUICK)} alone; says nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder to write to (%(default)s)")
    parser.add_argument("--docs", action="store_true", help="put the tables into the pages of docs/ that quote them")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(ALL):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if options.quick and (options.full or options.docs or not options.names or set(options.names) - set(QUICK)):
        parser.error(f"--quick goes with {', '.join(QUICK)}, by name, and with neither --full nor --docs")
    console = Console(width=None if Console().is_terminal else 150)
    for name in options.names or ALL:
        result: Result = QUICK[name](False, quick=True) if options.quick else ALL[name].run(options.full)
        result.show(console)
        result.write(options.out)
        if options.docs and name == "probes":
            probes.write_page(result)
        elif options.docs:
            quote(result, PAGES.get(name, PAGE))
        if options.docs and name == "checkpoint":
            checkpoint_chart.write(result, DOCS / "scale.svg")
    console.print(f"Written to {options.out}.")


def quote(result: Result, page: Path) -> None:
    """Puts a result between the two comments that carry its name."""
    marks = f"<!-- {result.name} -->", f"<!-- end of {result.name} -->"
    text = page.read_text(encoding="utf-8")
    found = re.subn(
        f"{marks[0]}.*?{marks[1]}", lambda _: f"{marks[0]}\n{result.markdown()}\n{marks[1]}", text, flags=re.S
    )
    if found[1] != 1:
        raise SystemExit(f"{page.name} has no place for {result.name}: it needs {marks[0]} and {marks[1]}, once.")
    page.write_text(found[0], encoding="utf-8")


if __name__ == "__main__":
    main()
