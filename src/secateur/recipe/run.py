"""Runs a recipe: every cell, a seed, a method and a sparsity, is an artefact on disk, so that a run can be taken up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.engines.spread import Engine, spread
from secateur.errors import BadInput
from secateur.report.run_facts import Cell
from secateur.report.run_files import RESULTS, SETTINGS, Both
from secateur.stores.staging import staged
from secateur.train.rounds import WEIGHTS, artefact, check_settings, load_state, locked, read_rounds, read_tensors

from .page import page
from .schema import Recipe
from .seed import Seed
from .training import Progress, device_of, resolve
from .ways import density_of


def quiet(what: str, done: int = 0, total: int = 0) -> None:
    """Progress for nobody."""


def run(
    recipe: Recipe,
    progress: Progress = quiet,
    say: Callable[[str], None] = quiet,
    *,
    engine: Engine = "serial",
    jobs: int = 1,
) -> list[Cell]:
    """Runs what is not there yet, and returns every cell; the folder then holds ``results.json`` and ``report.html``.

    Args:
        recipe: what to run.
        progress: told after every step what is trained and how far it is, and after every cell how many there are; of workers
            only the cells.
        say: told the schedules before the first training begins.
        engine, jobs: who runs it, and how many at once (`secateur.engines.spread`): a worker takes a seed's dense network, and
            when all of these are there, a method of a seed with all its sparsities. The cells are the same, bit for bit.

    Raises:
        BadInput: the folder is in use, or holds another recipe; a function of the recipe cannot be found; the dense network
            has no such metric as the recipe names.
        BadTensor: a loss or a weight became NaN or infinite; what was finished before is kept.
    """
    started = time.perf_counter()
    with held(recipe) as root:
        made: list[Both] = []
        total = len(recipe.seeds) * (1 + len(recipe.names()) * len(recipe.sparsities))
        lines = say
        for heard, some in _batches(recipe, progress, engine, jobs):
            for line in heard:
                lines(line)
            lines = quiet
            for one in some:
                _check_metrics(recipe, one[0])
                made.append(one)
                progress("all", len(made), total)
        made = _in_order(recipe, made)
        cells = [cell for cell, _ in made]
        write(root / RESULTS, to_json(cells))
        write(root / "costs.json", json.dumps([vars(cost) for _, cost in made if cost is not None], indent=1))
        write(root / "report.html", page(recipe, root, cells, time.perf_counter() - started))
        _export(recipe, root)
    return cells


@dataclass(frozen=True)
class _Job:
    """What a worker is to do: a method of a seed, or its dense network."""

    recipe: Recipe
    root: Path
    seed: int
    method: str | None
    threads: int
    jobs: int


Made = Iterable[Both]


def _batches(recipe: Recipe, progress: Progress, engine: Engine, jobs: int) -> Iterator[tuple[list[str], Made]]:
    """What is to be said, and cells with their costs, as they come."""
    root = Path(recipe.folder)
    if engine == "serial":
        for seed in recipe.seeds:
            one = Seed(recipe, root / f"seed-{seed}", seed, progress)
            yield list(one.check()), one.cells()
        return
    device = device_of(recipe.device)
    alike = recipe.model_copy(update={"device": device.type})  # not what each worker finds for itself
    first = [_Job(alike, root.resolve(), s, None, torch.get_num_threads(), jobs) for s in recipe.seeds]
    rest = [_Job(j.recipe, j.root, j.seed, m, j.threads, jobs) for j in first for m in recipe.methods]
    yield from spread(_work, [first, rest], engine, jobs, int(device.type == "cuda"))


def _work(job: _Job) -> tuple[list[str], Made]:
    with _threads(job.threads):
        one = Seed(job.recipe, job.root / f"seed-{job.seed}", job.seed, quiet, job.jobs)
        if job.method is None:
            return list(one.check()), [one.dense()]
        return [], list(one.method(job.method))


def _in_order(recipe: Recipe, made: list[Both]) -> list[Both]:
    """Seed by seed, each with its dense network and then the methods, as they come when one follows the other."""
    return sorted(made, key=lambda one: recipe.seeds.index(one[0].seed))


def check_folder(recipe: Recipe) -> None:
    """Refuses a folder that holds no run of this recipe.

    Raises:
        BadInput: nothing was run there, or a recipe with other settings.
    """
    root = Path(recipe.folder)
    if not (root / SETTINGS).exists():
        raise BadInput(f"{root} holds no run: run the recipe first.")
    check_settings(root / SETTINGS, recipe.model_dump(mode="json"), _free(recipe))


def _free(recipe: Recipe) -> set[str]:
    """The settings that what lies in the folder does not depend on. Seeds may be added, unless the export goes by the first."""
    by_first = recipe.export is not None and recipe.export.seed is None
    return {"compare", "lower_is_better"} | (set() if by_first else {"seeds"})


def _check_metrics(recipe: Recipe, cell: Cell) -> None:
    metric = None if recipe.compare is None else recipe.compare.metric
    for name in (*recipe.lower_is_better, *([] if metric is None else [metric])):
        if name not in cell.metrics:
            there = ", ".join(cell.metrics) or "nothing"
            raise BadInput(f"the recipe names the metric {name!r}, and what is measured is {there}: name one of these.")


@contextmanager
def held(recipe: Recipe) -> Iterator[Path]:
    """Holds the folder of a recipe's run, which is made if it is not there, and torch at the recipe's threads.

    Raises:
        BadInput: the folder is in use, or holds another recipe; a function of the recipe cannot be found.
    """
    _check_calls(recipe)
    root = Path(recipe.folder)
    with locked(root, recipe.model_dump(mode="json"), _free(recipe)), _threads(recipe.threads):
        yield root


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write(path: Path, text: str) -> None:
    """A text in a run's folder, whole, in place of the one before."""
    with staged(path, True, len(text.encode())) as stage:
        stage.write_text(text, "utf-8")


def to_json(cells: Iterable[Cell]) -> str:
    """Every cell."""
    return json.dumps([vars(c) for c in cells], indent=1)


def _check_calls(recipe: Recipe) -> None:
    trainings = [recipe.train, *(m.train for m in recipe.methods.values() if m.train is not None)]
    calls = [recipe.data, recipe.model, recipe.evaluate]
    calls += [m.dense.model for m in recipe.methods.values() if m.dense is not None]
    for call in (*calls, *(c for t in trainings for c in (t.optimizer, t.loss, t.loop))):
        if call is not None:
            resolve(call)


def _export(recipe: Recipe, root: Path) -> None:
    """Puts one network where others can take it from."""
    out, chosen = root / "export", recipe.export
    if chosen is None or out.exists():
        return
    seed = recipe.seeds[0] if chosen.seed is None else chosen.seed
    folder, method = root / f"seed-{seed}" / chosen.method, recipe.methods[chosen.method]
    if method.iterate is not None:
        rounds = read_rounds(folder)
        source = next(r.folder for r in rounds if r.asked == chosen.sparsity)
    else:
        source = folder / f"{chosen.sparsity:g}"
    more = {} if method.dense is None else {"density": density_of(chosen.sparsity)}
    model: Any = resolve(recipe.model if method.dense is None else method.dense.model)(**more)
    load_state(model, read_tensors(source / WEIGHTS))
    if not hasattr(model, "save_pretrained"):
        with artefact(out, model):
            return
    with staged(out, False, sum(t.numel() * t.element_size() for t in model.state_dict().values())) as stage:
        model.save_pretrained(stage)
