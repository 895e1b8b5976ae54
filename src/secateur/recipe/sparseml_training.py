"""What SparseML's recipes say of training: its length, the learning rate, weight decay; and all that is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import BadInput

from .sparseml_pruning import GRADUAL
from .sparseml_text import Modifier, short

_LONGEST = 1_000_000
_QUANTISED = "secateur does not quantise: do it to the pruned network, with a tool for that"
_TAUGHT = "a recipe trains with cross-entropy; for distillation write your own loop around secateur.Pruner"
_SECOND = "it scores weights by gradients or second derivatives, and recipes of secateur prune by magnitude"
_CALIBRATED = "it prunes by what flows through the network, which recipes of secateur do not do"
_YOURS = "do it in the function that model names"
LEFT_OUT = {
    "QuantizationModifier": _QUANTISED, "LegacyQuantizationModifier": _QUANTISED, "GPTQModifier": _QUANTISED,
    "SmoothQuantModifier": _QUANTISED, "LogarithmicEqualizationModifier": _QUANTISED,
    "DistillationModifier": _TAUGHT, "PerLayerDistillationModifier": _TAUGHT, "OutputDistillationModifier": _TAUGHT,
    "MovementPruningModifier": _SECOND, "MFACPruningModifier": _SECOND, "MFACGlobalPruningModifier": _SECOND,
    "OBSPruningModifier": _SECOND, "CAPruningModifier": _SECOND,
    "SparseGPTModifier": _CALIBRATED, "WandaPruningModifier": _CALIBRATED,
    "RigLPruningModifier": "it moves its mask while it trains, which recipes of secateur do not say in these words",
    "TopKASTPruningModifier": "it keeps gradients for weights that are pruned, which secateur does not do",
    "LayerPruningModifier": _YOURS, "LayerThinningModifier": "secateur leaves shapes as they are",
    "TrainableParamsModifier": _YOURS, "SetParamModifier": _YOURS, "GradualParamModifier": _YOURS,
}  # fmt: skip
_RATES = ("SetLearningRateModifier", "LearningRateFunctionModifier", "LearningRateModifier")
_HERE = {*GRADUAL, *_RATES, "EpochRangeModifier", "SetWeightDecayModifier"}


def epochs_of(modifiers: Sequence[Modifier], notes: list[str]) -> int:
    """The length of training: SparseML takes the latest end of all modifiers. 0 where none has one.

    Raises:
        BadInput: an end that is no number, or beyond a million epochs.
    """
    asked = [m for m in modifiers if m.kind == "EpochRangeModifier"]
    known = [m for m in modifiers if m.get("end_epoch", "end") is not None]
    last = max((m.number("end_epoch", "end") for m in known), default=0.0)
    if last > _LONGEST:
        raise BadInput(f"training ends at epoch {last:g}: a recipe has {_LONGEST} at most.")
    if last <= 0:
        return 0
    range_end = max((m.number("end_epoch", "end") for m in asked), default=None)
    if range_end is None:
        notes.append(
            f"No EpochRangeModifier says how long to train: train.epochs is where the last modifier ends, {last:g}."
        )
    elif range_end < last:
        notes.append(
            f"EpochRangeModifier ends at {range_end:g} and another modifier at {last:g}: SparseML trains to the later."
        )
    if any(m.number("start_epoch", "start") > 0 for m in asked):
        notes.append(
            "EpochRangeModifier: a start after 0 goes on with an earlier run; here training begins at epoch 0."
        )
    if len(stages := dict.fromkeys(m.stage for m in modifiers)) > 1:
        notes.append(
            f"The stages {', '.join(str(s) for s in stages if s)} are read as one run, with one count of epochs."
        )
    if last % 1:
        notes.append(f"Training ends at epoch {last:g}; train.epochs is whole, {math.ceil(last)}.")
    return math.ceil(last)


@dataclass(frozen=True)
class _Rate:
    """A learning rate from one epoch to another."""

    source: Modifier
    kind: str
    begin: float
    end: float
    first: float
    last: float | None

    @property
    def falls(self) -> bool:
        """Whether it is no warm-up."""
        return self.last is None or self.last <= self.first

    def __str__(self) -> str:
        down = "" if self.last is None or self.kind == "constant" else f" to {self.last:g}"
        return f"{self.kind}, {self.first:g}{down}, in epochs {self.begin:g} to {self.end:g}"


def training_of(modifiers: Sequence[Modifier], epochs: int, notes: list[str]) -> dict[str, Any]:
    """``train`` of a recipe.

    Raises:
        BadInput: a learning rate or a decay that is no number, or below 0.
    """
    args: dict[str, float] = {}
    kind = "constant"
    rates = _rates([m for m in modifiers if m.kind in _RATES], epochs, notes)
    if rates:
        main = max(reversed(rates), key=lambda r: (r.falls, r.end - r.begin))  # never a warm-up, if there is another
        args["lr"], kind = _carried(main, epochs, notes)
        for other in rates:
            if other is not main:
                notes.append(
                    f"{other.source}: the learning rate ({other}) is left out; there is one for all of training."
                )
    else:
        notes.append("Fill in train.optimizer.args.lr: the recipe has no learning rate.")
    for m in modifiers:
        if m.kind == "SetWeightDecayModifier":
            start, decay = _start(m), m.number("weight_decay", least=0.0)
            if start <= 0 and "weight_decay" not in args:
                args["weight_decay"] = decay
            else:
                notes.append(
                    f"{m}: a weight decay of {decay:g} from epoch {start:g} on is left out; it does not change here."
                )
        if m.kind in (*_RATES, "SetWeightDecayModifier") and m.get("param_groups") is not None:
            notes.append(
                f"{m}: param_groups {short(m.get('param_groups'))} is left out; it holds for all parameters here."
            )
    return {"epochs": epochs, "optimizer": {"call": "torch.optim:SGD", "args": args}, "learning_rate": kind}


def _start(m: Modifier) -> float:
    return m.number("start_epoch", "start") if m.get("start_epoch", "start") is not None else -1.0


def _rates(found: list[Modifier], epochs: int, notes: list[str]) -> list[_Rate]:
    rates = []
    for m in found:
        begin = max(0.0, _start(m))
        if m.kind == "SetLearningRateModifier":
            if m.get("learning_rate") is None:
                notes.append(f"{m}: it has no learning_rate, and does nothing.")
                continue
            later = [max(0.0, _start(other)) for other in found if other is not m]
            end = min((s for s in later if s >= begin), default=float(epochs))
            rate = m.number("learning_rate", least=0.0)
            rates.append(_Rate(m, "constant", begin, end, rate, rate))
            continue
        end = m.number("end_epoch", "end") if m.get("end_epoch", "end") is not None else -1.0
        first = m.number("init_lr", least=0.0)
        last = m.number("final_lr", least=0.0) if m.kind == "LearningRateFunctionModifier" else None
        rates.append(
            _Rate(m, short(m.get("lr_func", "lr_class")), begin, end if end >= 0 else float(epochs), first, last)
        )
    return rates


def _carried(r: _Rate, epochs: int, notes: list[str]) -> tuple[float, str]:
    """The initial learning rate and its kind, of those recipes have: constant, linear to 0, cosine to 0."""
    if r.kind == "constant":
        return r.first, "constant"
    if not r.falls and r.last is not None:
        notes.append(f"{r.source}: a learning rate that rises ({r}) became constant at {r.last:g}.")
        return r.last, "constant"
    kind = r.kind if r.kind in ("linear", "cosine") else "linear"
    if kind != r.kind:
        given = r.source.get("lr_kwargs")
        how = f" ({short(given)})" if given is not None else ""
        notes.append(f"{r.source}: {r.kind}{how} has no counterpart; learning_rate is linear, from {r.first:g} to 0.")
        return r.first, kind
    if r.last:
        notes.append(f"{r.source}: the learning rate ended at {r.last:g}; here it ends at 0.")
    if r.begin > 0 or r.end < epochs:
        notes.append(f"{r.source}: it went from epoch {r.begin:g} to {r.end:g}; here from 0 to {epochs}.")
    return r.first, kind


def leave_out(modifiers: Sequence[Modifier], notes: list[str]) -> None:
    """A note for every modifier that has no place in a recipe, once for each kind and stage."""
    for m in {str(m): m for m in modifiers}.values():
        if m.kind == "ACDCPruningModifier":
            notes.append(_phases(m))
        elif m.kind == "ConstantPruningModifier":
            notes.append(f"{m}: it holds the zeros that are there; secateur does so by itself, once it has pruned.")
        elif m.kind not in _HERE:
            why = LEFT_OUT.get(m.kind, "it is not known here")
            notes.append(f"{m} was not carried over: {why}.")


def _phases(m: Modifier) -> str:
    begin, end, every = m.number("start_epoch"), m.number("end_epoch"), m.number("update_frequency", least=1e-6)
    return (
        f"{m} was not carried over: recipes have no AC/DC. In a loop of your own that is secateur.Pruner(..., regrow=True) with "
        f"secateur.schedules.ac_dc({short(m.get('compression_sparsity'))}, begin=, end=, sparse=, dense=) in steps: the first "
        f"sparse phase begins at epoch {max(0.0, begin) + every:g} (SparseML's first phase is dense), each phase has {every:g} "
        f"epochs, the end is epoch {end:g}."
    )
