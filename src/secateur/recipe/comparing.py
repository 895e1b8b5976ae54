"""A recipe as a comparison: what ``secateur compare`` does beside running it."""

from __future__ import annotations

from pathlib import Path

from secateur.evaluate.compare import Comparison, baseline_of, compare
from secateur.report.compare_page import render
from secateur.report.run_files import read_run

from .page import emptied, machine_facts, percent_of, recipe_text
from .run import check_folder, write
from .schema import Compare, Recipe

OWN_LOOP = "{}: the training loop is the recipe's own, and what it looks at beside its batches is not seen here."


def check_baseline(recipe: Recipe) -> None:
    """Refuses, before anything is trained, a recipe that has nothing to hold its methods against.

    Raises:
        BadInput: as `secateur.evaluate.compare.baseline_of`.
    """
    baseline_of(recipe.names(), None if recipe.compare is None else recipe.compare.baseline)


def compared(recipe: Recipe) -> Comparison:
    """Compares the finished cells in a recipe's folder, which then holds ``compare.json`` and ``compare.html``.

    Raises:
        BadInput: nothing was run yet, or another recipe; as `secateur.evaluate.compare.compare`.
    """
    check_folder(recipe)
    root, asked = Path(recipe.folder), recipe.compare or Compare()
    found = read_run(root)
    c = compare(
        found.cells, asked.baseline, metric=asked.metric, seeds=recipe.seeds, costs=found.costs, percent=percent_of(recipe),
        lower_is_better=recipe.lower_is_better,
    )  # fmt: skip
    own = [n for n, m in recipe.methods.items() if (m.train or recipe.train).loop is not None]
    notes = [*(OWN_LOOP.format(n) for n in own), *emptied(found.cells)]
    write(root / "compare.json", c.to_json())
    write(root / "compare.html", render(c, recipe.name, recipe.about, machine_facts(root), notes, recipe_text(recipe)))
    return c
