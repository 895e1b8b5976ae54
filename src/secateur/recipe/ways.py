"""What a recipe's stages mean to the functions that carry them out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from itertools import islice
from typing import Any

import secateur
from secateur.core import schedules

from .schema import Calibrate, Choice, Iterate, Method, Prune, Schedule, Sparse, Training


def way_of(method: Method | None) -> Choice | Sparse | None:
    """The stage that prunes; ``None`` for a dense network."""
    return None if method is None else method.prune or method.iterate or method.sparse


def choice_of(how: Choice | Sparse, seed: int) -> dict[str, Any]:
    """What to prune and how, as for `secateur.prune`; a random criterion is that of the seed."""
    fields = Choice.model_fields if isinstance(how, Choice) else ("allocation", "include", "ignore")
    found: dict[str, Any] = how.model_dump(include={*fields})
    if isinstance(how, Prune) and how.looks:
        return _without_data(how, found)
    random = isinstance(how, Sparse) or how.criterion == "random"
    return {**found, "criterion": secateur.random(seed)} if random else found


def _without_data(how: Prune, found: dict[str, Any]) -> dict[str, Any]:
    """The same by magnitude: which tensors and in which pattern, for plans before the data and for holding zeros after."""
    rows = how.criterion == "wanda" and "pattern" not in how.model_fields_set
    even = rows and "allocation" not in how.model_fields_set
    more = {"pattern": "row"} if rows else {}
    return {**found, "criterion": "magnitude", **more, **({"allocation": "uniform"} if even else {})}


def with_data(how: Prune, batches: Iterable[Any], loss: Any) -> dict[str, Any]:
    """How to prune with data, as for `secateur.prune`."""
    fields = {k: v for k, v in how.model_dump(include={*Choice.model_fields}).items() if k in how.model_fields_set}
    asked = how.calibration or Calibrate()
    calibration = secateur.Calibration(list(islice(batches, asked.batches)), loss=loss, blocks=asked.blocks)
    return {**fields, "solver": how.solver, "calibration": calibration}


def training_of(method: Method | None, train: Training) -> Training:
    """The training that prunes: the whole of it, or after the dense one the fine-tuning."""
    if method is None:
        return train
    how, again, prune = method.train or train, method.finetune, method.prune
    if again is None:
        return how
    if prune is not None and (prune.schedule == "one-shot" or prune.start == "dense"):
        return how.model_copy(update=again.model_dump())
    return how.model_copy(update={"epochs": how.epochs + again.epochs})


def epochs_of(method: Method | None, train: Training) -> int:
    """Epochs that are spent on a network, those of the dense one it begins with included."""
    if method is None:
        return train.epochs
    return (method.train or train).epochs + (0 if method.finetune is None else method.finetune.epochs)


def control_of(method: Method | None) -> str:
    """What a method is a control of: ``"random"``, ``"small dense"``, or of nothing."""
    if method is None:
        return ""
    if method.dense is not None:
        return "small dense"
    return "random" if method.prune is not None and method.prune.criterion == "random" else ""


def density_of(sparsity: float) -> float:
    """One minus the sparsity, as it was written.

    >>> density_of(0.9)
    0.1
    """
    return float(1 - Fraction(str(sparsity)))


def schedule_for(asked: Any, target: float, steps: int, per_epoch: int) -> schedules.Schedule:
    """The schedule of a training of so many steps."""
    if not isinstance(asked, Schedule):
        return schedules.auto(target, steps)
    unit = per_epoch if asked.unit == "epochs" else 1
    begin, end, every = round(asked.begin * unit), round(asked.end * unit), max(1, round(asked.every * unit))
    if end > steps:
        raise secateur.BadInput(
            f"the schedule ends at step {end}, and the training has {steps} steps: the target would not be reached. "
            f"End it at {steps / unit:g} {asked.unit} or before, or train longer."
        )
    more: dict[str, Any] = {"power": asked.power} if asked.kind == "polynomial" else {}
    make = getattr(schedules, asked.kind)
    made: schedules.Schedule = make(target, begin=begin, end=end, every=every, initial=asked.initial, **more)
    return made


def begun(rewind: int | str, epochs: int, per_epoch: int) -> int:
    """Epochs of the dense round that a control's weights have behind them."""
    return rewind // per_epoch if isinstance(rewind, int) else 0 if rewind == "init" else epochs


def between(sparsities: list[float], how: Iterate) -> list[float]:
    """The sparsity of every round, on the original size."""
    out, before = [], 0.0
    for s in sparsities:
        needed = math.ceil(math.log((1 - s) / (1 - before)) / math.log(1 - how.rate) - 1e-9)
        rounds = needed if how.rounds is None else how.rounds
        out += [1 - (1 - before) ** (1 - r / rounds) * (1 - s) ** (r / rounds) for r in range(1, rounds)]
        out.append(s)
        before = s
    return out
