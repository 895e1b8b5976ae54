"""``secateur sensitivity``: which layers of a recipe's network can bear what, and what to prune of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from secateur.errors import BadInput
from secateur.evaluate.budget import Allocation
from secateur.recipe.schema import Recipe
from secateur.recipe.sensitivity import Scanned, scan

from .recipes import bars, save


def numbers(text: str | None) -> tuple[float, ...] | None:
    """``0.5,0.8`` as numbers.

    Raises:
        BadInput: something that is none.
    """
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise BadInput(
            f"--sparsities takes numbers with commas between them, such as .5,.8,.9; got {text!r}."
        ) from None


def groups_of(given: Sequence[str] | None) -> dict[str, list[str]] | None:
    """``NAME=GLOB``, a glob each; of one name all are of one group.

    Raises:
        BadInput: no name, or no glob.
    """
    found: dict[str, list[str]] = {}
    for text in given or ():
        name, _, glob = text.partition("=")
        if not name or not glob:
            raise BadInput(f"--group takes NAME=GLOB; got {text!r}.")
        found.setdefault(name, []).append(glob)
    return found or None


def scanned(recipe: Recipe, sparsities: Sequence[float] | None, more: Mapping[str, Any]) -> Scanned:
    """A scan with a bar on the terminal; silent elsewhere."""
    with bars() as (told, _):
        return scan(recipe, sparsities, progress=told, **more)


def allocated(found: Scanned, share: float, budget: Any) -> tuple[Allocation, Path]:
    """An allocation, and the file beside the scan that it was written to."""
    made = found.scan.allocation(share, budget=budget, flops=found.flops)
    place = found.folder / f"allocation-{budget}-{share:g}.json"
    facts = {
        "sparsity": made.sparsity, "budget": made.budget, "asked": made.asked, "predicted_loss": made.loss,
        "metric": found.scan.metric, "counts": dict(made.counts), "allocation": made.shares,
    }  # fmt: skip
    save(json.dumps(facts, indent=1), place, True)
    return made, place


def shown(found: Scanned, made: Allocation | None, place: Path | None) -> list[Any]:
    """What is printed: the table and the answers, the allocation, where the page lies."""
    parts: list[Any] = [found.scan]
    if made is not None:
        parts += [Text(f"\n{made.budget}, {made.asked:g}:", style="bold"), Text(str(made)), Text(f"written to {place}")]
    return [*parts, Text(f"The report: {(found.folder / 'report.html').resolve()}")]
