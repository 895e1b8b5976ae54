"""Small recipes in SparseML's dialect, and what they become."""

from __future__ import annotations

from typing import Any

from secateur.core import schedules
from secateur.recipe.load import check, parse
from secateur.recipe.sparseml import imported, written
from secateur.recipe.ways import schedule_for

GM = {
    "params": ["conv.weight"], "init_sparsity": 0.05, "final_sparsity": 0.8, "start_epoch": 1.0, "end_epoch": 8.0,
    "update_frequency": 0.5,
}  # fmt: skip
SCHEDULE = {"kind": "cubic", "begin": 1.0, "end": 8.0, "every": 0.5, "initial": 0.05, "unit": "epochs"}
EPOCHS = "!EpochRangeModifier {start_epoch: 0, end_epoch: 10}"


def modifier(kind: str = "GMPruningModifier", **settings: Any) -> str:
    """One modifier in flow style, in the settings of ``GM`` where it is one of that family; ``None`` leaves one out."""
    return f"!{kind} {{{', '.join(f'{k}: {v}' for k, v in settings.items() if v is not None)}}}"


def gm(kind: str = "GMPruningModifier", **settings: Any) -> str:
    return modifier(kind, **{**GM, **settings})


def old(*modifiers: str, head: str = "") -> str:
    return head + "modifiers:\n" + "".join(f"  - {m}\n" for m in (EPOCHS, *modifiers))


def asked(*modifiers: str, head: str = "") -> tuple[dict[str, Any], str]:
    """The recipe and its notes. Its YAML says the same, has no aliases, and fits the schema."""
    recipe, notes = imported(old(*modifiers, head=head), "old.yaml")
    assert check(recipe).methods
    assert parse(written(recipe, "old.yaml")) == recipe
    assert not [n for n in notes if not n.endswith(".")]
    return recipe, "\n".join(notes)


def prune_of(recipe: dict[str, Any], method: str = "gradual") -> dict[str, Any]:
    found: dict[str, Any] = recipe["methods"][method]["prune"]
    return found


def schedule_of(recipe: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = prune_of(recipe)["schedule"]
    return found


def built(recipe: dict[str, Any], steps_per_epoch: int = 100) -> schedules.Schedule:
    """The schedule itself, in steps, as a run makes it."""
    read = check(recipe)
    (method,) = read.methods.values()
    assert method.prune is not None
    return schedule_for(method.prune.schedule, read.sparsities[0], read.train.epochs * steps_per_epoch, steps_per_epoch)


def lr(
    kind: str = "linear", begin: float = 0, end: float = 10, first: float = 0.1, last: float = 0.0, **more: Any
) -> str:
    function = {"lr_func": kind, "init_lr": first, "final_lr": last}
    return modifier("LearningRateFunctionModifier", start_epoch=begin, end_epoch=end, **function, **more)
