"""``secateur run`` and ``secateur compare``: a recipe with a bar, and a table at the end; ``secateur import-recipe``."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from secateur.engines.spread import Engine
from secateur.errors import BadInput, OutputExists
from secateur.evaluate.compare import Comparison
from secateur.recipe import comparing, load, sparseml
from secateur.recipe.run import run
from secateur.recipe.schema import Recipe
from secateur.recipe.training import Progress as Told
from secateur.report.run_facts import Cell
from secateur.stores.staging import staged


def prepared(path: Path, settings: Sequence[str], form: str | None, resume: bool) -> Recipe:
    """A recipe, read and checked; its folder is free, or is to be taken up. Its functions may lie in this folder."""
    sys.path.insert(0, str(Path.cwd()))
    recipe = load.read(path, settings, form)
    if (Path(recipe.folder) / "run.json").exists() and not resume:
        raise OutputExists(f"{recipe.folder} holds a run already: go on with it with --resume, or --set folder=….")
    return recipe


def run_shown(recipe: Recipe, engine: str | None, jobs: int) -> list[Cell]:
    """Runs a recipe with bars on the terminal; silent elsewhere."""
    chosen = _engine(engine, jobs)
    with bars() as (told, say):
        return run(recipe, told, say, engine=chosen, jobs=jobs)


def _engine(named: str | None, jobs: int) -> Engine:
    """Who runs the cells: several at once in processes, unless Ray is named."""
    engines: dict[str | None, Engine] = {"serial": "serial", "processes": "processes", "ray": "ray"}
    engines[None] = "serial" if jobs == 1 else "processes"
    if named not in engines:
        raise BadInput(f"--engine is serial, processes or ray; got {named!r}.")
    if named == "serial" and jobs > 1:
        raise BadInput(f"--engine serial runs one after the other; got --jobs {jobs}.")
    return engines[named]


def against(baseline: str | None, metric: str | None) -> list[str]:
    """The settings that name what to compare with, and by what."""
    named = {"compare.baseline": baseline, "compare.metric": metric}
    return [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]


def compared(recipe: Recipe, found: bool, engine: str | None, jobs: int) -> Comparison:
    """Runs what is not there yet, unless only what is ``found`` is asked for, and compares."""
    comparing.check_baseline(recipe)
    if not found:
        run_shown(recipe, engine, jobs)
    return comparing.compared(recipe)


@contextmanager
def bars() -> Iterator[tuple[Told, Callable[[str], None]]]:
    """A bar for all cells, and one for what is trained now."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        every, now = progress.add_task("results", total=None), progress.add_task("", total=None)

        def told(what: str, done: int, total: int) -> None:
            progress.update(every if what == "all" else now, completed=done, total=total)
            if what != "all":
                progress.update(now, description=escape(what))

        yield told, lambda line: console.print(line, markup=False, highlight=False) if console.is_terminal else None


def table(recipe: Recipe, cells: Sequence[Cell]) -> Table:
    """One row a method and sparsity: mean over the seeds, and the spread where there are several."""
    names = list(dict.fromkeys(m for c in cells for m in c.metrics))
    shown = Table(title=Text(recipe.name), title_justify="left")
    shown.add_column("method")
    for head in ("sparsity", "epochs", *names):
        shown.add_column(Text(head), justify="right")
    groups: dict[tuple[str, float], list[Cell]] = {}
    for c in cells:
        groups.setdefault((c.method, c.asked), []).append(c)
    for (method, _), some in groups.items():
        values = [_spread([c.metrics[n] for c in some if n in c.metrics]) for n in names]
        shown.add_row(Text(method), f"{some[0].sparsity:.4f}", str(some[0].epochs), *values)
    return shown


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def imported(path: Path) -> tuple[str, list[str]]:
    """A SparseML recipe as the text of a new one, and what is to be said of it."""
    recipe, notes = sparseml.imported(load.text_of(path), path.name)
    return sparseml.written(recipe, path.name), notes


def save(text: str, out: Path, overwrite: bool) -> None:
    """Writes a recipe, whole or not at all."""
    with staged(out, overwrite, len(text.encode())) as stage:
        stage.write_text(text, "utf-8")
