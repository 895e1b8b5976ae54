"""Runs the first cut: ``python -m examples.first_cut [--out FOLDER] [--quick]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.first_cut.job import run
from examples.first_cut.page import render
from examples.first_cut.settings import FULL, QUICK
from examples.first_cut.tables import print_summary
from examples.first_cut.terminal import Stages


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prunes, scores, and writes ``report.html`` and ``report.json`` into the output folder."""
    parser = argparse.ArgumentParser(prog="python -m examples.first_cut", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/first-cut"), help="folder to write to (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows only that everything works")
    options = parser.parse_args(arguments)
    console = Console()
    stages = Stages(console)
    results = run(QUICK if options.quick else FULL, stages)
    print_summary(results, console)
    options.out.mkdir(parents=True, exist_ok=True)
    page = options.out / "report.html"
    page.write_text(render(results, stages.seconds), encoding="utf-8")
    numbers = results.to_dict() | {"seconds": stages.seconds}
    (options.out / "report.json").write_text(json.dumps(numbers, indent=1, allow_nan=False), encoding="utf-8")
    stages.say(f"{sum(stages.seconds.values()):.0f} s in all. The report: {page.resolve()}")


if __name__ == "__main__":
    main()
