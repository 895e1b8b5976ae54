"""Cells and what they took, as a run leaves them on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import BadInput

from .run_facts import DENSE, Cell, Cost

CELL, TAKEN, RESULTS, SETTINGS = "cell.json", "taken.json", "results.json", "run.json"
Both = tuple[Cell, Cost | None]
"""A cell, and what it took where that is known."""
Key = tuple[int, str, float]


@dataclass(frozen=True)
class Found:
    """What lies in the folder of a run; ``settings`` are its recipe's, empty where there is none."""

    cells: Sequence[Cell]
    costs: Sequence[Cost]
    settings: dict[str, Any]


def read_run(path: Path) -> Found:
    """The finished cells of a run, by its folder, whether or not it came to its end; or those of a ``results.json``.

    Raises:
        BadInput: nothing is there, or nothing that can be read.
    """
    if path.is_file():
        return Found(_results(path), [], {})
    settings = _json(path / SETTINGS) if (path / SETTINGS).exists() else {}
    found: dict[Key, Both] = {}
    if (path / RESULTS).exists():
        found |= {_key(cell): (cell, None) for cell in _results(path / RESULTS)}
    found |= {_key(both[0]): both for both in map(read_cell, (p.parent for p in path.glob(f"seed-*/*/*/{CELL}")))}
    seeds = settings.get("seeds", sorted({seed for seed, _, _ in found}))
    names = [DENSE, *_methods(settings)] if "methods" in settings else list(dict.fromkeys(m for _, m, _ in found))
    kept = [both for (seed, name, _), both in found.items() if seed in seeds and name in names]
    if not kept:
        raise BadInput(f"{path} holds no finished cell: it should be the folder of a run, or its {RESULTS}.")
    kept.sort(key=lambda both: (seeds.index(both[0].seed), names.index(both[0].method), both[0].asked))
    return Found([cell for cell, _ in kept], [cost for _, cost in kept if cost is not None], settings)


def read_cell(folder: Path) -> Both:
    """A cell that is on disk.

    Raises:
        BadInput: it cannot be read.
    """
    cell = _cell(_json(folder / CELL), folder / CELL)
    took = _json(folder / TAKEN) if (folder / TAKEN).exists() else None
    return cell, None if took is None else Cost(cell.seed, cell.method, cell.asked, **took)


def _methods(settings: dict[str, Any]) -> list[str]:
    """The methods of a recipe, each followed by its controls."""
    found = []
    for name, method in settings["methods"].items():
        controls = (method.get("iterate") or {}).get("controls", [])
        found += [name, *(f"{name}, {control}" for control in controls)]
    return found


def _results(path: Path) -> list[Cell]:
    found = _json(path)
    if not isinstance(found, list):
        raise BadInput(f"{path} holds no list of cells.")
    return [_cell(facts, path) for facts in found]


def _cell(facts: Any, path: Path) -> Cell:
    try:
        return Cell(**facts)
    except TypeError as e:
        raise BadInput(f"{path} holds something else than cells: {e}.") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"{path} cannot be read: {e}.") from None


def _key(cell: Cell) -> Key:
    return cell.seed, cell.method, cell.asked
