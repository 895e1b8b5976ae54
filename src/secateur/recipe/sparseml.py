"""Recipes of SparseML, whose project ended in June 2025, as recipes of secateur; what has no counterpart is said.

Facts and formulas are those of github.com/neuralmagic/sparseml, ``src/sparseml/pytorch/sparsification`` for the tagged
form and ``src/sparseml/modifiers`` for the staged one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from secateur.errors import BadInput

from .sparseml_pruning import GRADUAL, Way, groups, ways_of
from .sparseml_text import read
from .sparseml_training import epochs_of, leave_out, training_of

DATA, MODEL = "my_package.module:data", "my_package.module:model"
_FILL_IN = {
    "data": "fill in: a function (seed) -> data, with .train(generator) and .test",
    "model": "fill in: a function () -> network; load the trained one here if pruning starts from it",
    "train": "fill in the optimizer: SparseML leaves it to the training script",
}


def imported(text: str, where: str) -> tuple[dict[str, Any], list[str]]:
    """A SparseML recipe as a recipe of secateur, a plain mapping, and a sentence for all that differs or was left out.

    Args:
        text: the recipe: YAML, or Markdown with YAML between two lines ``---``.
        where: the file's name: what errors call it, and where ``name`` and ``folder`` come from.

    Raises:
        BadInput: not such a recipe, or one in which nothing prunes by magnitude.

    >>> recipe, notes = imported('''
    ... modifiers:
    ...   - !EpochRangeModifier {start_epoch: 0, end_epoch: 10}
    ...   - !GMPruningModifier
    ...     {params: ["re:.*conv.weight"], init_sparsity: 0.05, final_sparsity: 0.8, start_epoch: 1, end_epoch: 8,
    ...      update_frequency: 0.5}
    ... ''', "old.yaml")
    >>> recipe["sparsities"], recipe["methods"]["gradual"]["prune"]["include"]
    ([0.8], ['*conv.weight'])
    >>> recipe["methods"]["gradual"]["prune"]["schedule"]
    {'kind': 'cubic', 'begin': 1.0, 'end': 8.0, 'every': 0.5, 'initial': 0.05, 'unit': 'epochs'}
    """
    modifiers = read(text, where)
    notes: list[str] = []
    try:
        epochs = epochs_of(modifiers, notes)
        ways = [w for m in modifiers if m.kind in GRADUAL for w in ways_of(m, epochs, notes)]
        leave_out(modifiers, notes)
        if not ways:
            raise BadInput(_nothing(any(m.kind == "ConstantPruningModifier" for m in modifiers), notes))
        train = training_of(modifiers, epochs, notes)
        methods = _methods(ways, train, notes)
    except BadInput as e:
        raise BadInput(f"{where}: {e}") from None
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", PurePath(where).stem).strip("-.") or "imported"
    recipe = {
        "version": 1, "name": name, "folder": f"runs/{name}", "data": DATA, "model": MODEL, "train": train,
        "sparsities": [max(w.target for w in ways)], "methods": methods,
    }  # fmt: skip
    return recipe, [*_to_fill_in(), *notes]


def _to_fill_in() -> list[str]:
    return [
        f"Fill in data and model: a SparseML recipe names neither, so {DATA} and {MODEL} stand there.",
        "Fill in train.optimizer: a SparseML recipe does not name it, so torch.optim:SGD stands there.",
        "A run starts from what model returns: load the trained network there if SparseML started from one.",
    ]


def _nothing(constant: bool, notes: list[str]) -> str:
    found = "nothing in it prunes by magnitude, so there is no recipe to write."
    if constant:
        found += (
            " To train on with the zeros that a network has, as ConstantPruningModifier does, "
            "secateur.Pruner(model, optimizer) is enough."
        )
    return " ".join([found, *notes])


def _methods(ways: list[Way], train: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """One method for all that is pruned, as near as one can be."""
    first = ways[0]
    alike = [w for w in ways if (w.target, w.allocation, w.pattern, w.schedule) ==
             (first.target, first.allocation, first.pattern, first.schedule)]  # fmt: skip
    if len(alike) == len(ways):
        if len(ways) > 1 and first.allocation == "global" and not groups(first.pattern):
            notes.append("Each global modifier had a pool of its own; here all their tensors are in one.")
        return {"gradual": {"prune": _prune(first, _together(ways), first.schedule)}}
    named = [w for w in ways if w.include is not None]
    one_kind = len({(w.pattern, w.allocation) for w in ways}) == 1 and len({w.include for w in ways}) > 1
    if len(named) == len(ways) and one_kind and first.allocation == "uniform":
        return _one_shot(ways, train, notes)
    kept = max(ways, key=lambda w: (w.target, w.schedule["end"]))
    for w in ways:
        if w is not kept:
            notes.append(
                f"{w.source} was not carried over beside the one to {kept.target:g}, since a method has one pattern, one "
                f"allocation and one schedule: {_shown(w)}."
            )
    return {"gradual": {"prune": _prune(kept, kept.include, kept.schedule)}}


def _one_shot(ways: list[Way], train: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Tensors with final sparsities of their own. A schedule has one target, so they are pruned at once and trained again."""
    shares: dict[str, float] = {}
    for w in ways:
        for glob in w.include or ():
            shares[glob] = max(w.target, shares.get(glob, 0.0))
    begin = min(w.schedule["begin"] for w in ways)
    again = max(1, train["epochs"] - int(begin))
    notes.append(
        "The final sparsity differs between tensors, and a gradual schedule has one target: each is pruned to its own at once, "
        f"and the network is trained for {again} epochs with the zeros held. The schedule is left out: "
        + "; ".join(dict.fromkeys(_shown(w) for w in ways))
        + "."
    )
    notes.append("sparsities names the highest; the mapping in allocation decides. Its globs must not overlap.")
    prune = {**_prune(ways[0], tuple(shares), "one-shot"), "allocation": shares}
    return {"one-shot": {"prune": prune, "finetune": {"epochs": again, "learning_rate": train["learning_rate"]}}}


def _shown(w: Way) -> str:
    s = w.schedule
    return f"{s['initial']:g} to {w.target:g}, {s['kind']}, epochs {s['begin']:g} to {s['end']:g}, every {s['every']:g}"


def _together(ways: list[Way]) -> tuple[str, ...] | None:
    if any(w.include is None for w in ways):
        return None
    return tuple(dict.fromkeys(glob for w in ways for glob in w.include or ()))


def _prune(w: Way, include: tuple[str, ...] | None, schedule: Any) -> dict[str, Any]:
    chosen = {} if include is None else {"include": list(include)}
    head = {"criterion": "magnitude", "allocation": w.allocation, "pattern": w.pattern}
    return {**head, **chosen, "min_keep": 0, "schedule": schedule}


def written(recipe: dict[str, Any], source: str) -> str:
    """A recipe as YAML, with what it came from and what to fill in.

    Args:
        recipe: what `imported` returned.
        source: the name of the file it came from.
    """
    lines = [f"# Imported by secateur from the SparseML recipe {ascii(source)[1:-1]}. What could not be carried over was",
             "# printed with it. Fill in what is marked, then look at it with: secateur run THIS.yaml --dry-run"]  # fmt: skip
    for key, value in recipe.items():
        if key in _FILL_IN:
            lines.append(f"# {_FILL_IN[key]}")
        lines.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=120).rstrip("\n"))
    return "\n".join(lines) + "\n"
