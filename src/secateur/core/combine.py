"""Which choices have a meaning together. What is refused here is refused everywhere; ``docs/combinations.md`` is made from it."""

from __future__ import annotations

from dataclasses import dataclass

from .allocate import CAPS
from .criteria import Criterion, magnitude
from .heads import Head, UnitPattern
from .owl import OWL
from .patterns import NM, Pattern, Row, Unstructured
from .spelling import Allocation


@dataclass(frozen=True)
class Choice:
    """One combination of choices, all resolved; ``caps`` says whether ``max_sparsity`` or ``min_keep`` is set."""

    pattern: Pattern
    allocation: Allocation
    criterion: Criterion
    nonfinite: str = "error"
    sparsity: float | None = None
    threshold: float | None = None
    caps: bool = False


def why_refused(c: Choice) -> str | None:
    """Why a combination is not defined, or ``None`` if it is.

    >>> why_refused(Choice(NM(2, 4), "erk", magnitude))
    '2:4 fixes how many weights every tensor loses, so no allocation applies: leave allocation out'
    """
    if isinstance(c.pattern, NM) and (reason := _groups(c, c.pattern)):
        return reason
    if isinstance(c.pattern, Row) and c.allocation == "global":
        return 'rows compete inside themselves, so each tensor needs a count of its own: say allocation="uniform" or another'
    if c.threshold is not None and (reason := _threshold(c)):
        return reason
    if c.allocation == "lamp" and (reason := _lamp(c)):
        return reason
    if callable(c.allocation) or not isinstance(c.allocation, str):
        if c.caps:
            return f"OWL, a mapping or a function gives every count itself, so {CAPS} do not apply"
    if isinstance(c.allocation, OWL) and isinstance(c.pattern, Head):
        return "OWL gives every tensor its count, and a head spans several: choose another allocation"
    if c.nonfinite == "keep" and isinstance(c.pattern, UnitPattern) and c.criterion is not magnitude:
        return 'nonfinite="keep" with blocks, channels or heads is defined for magnitude: another score of NaN means nothing'
    return None


def _groups(c: Choice, pattern: NM) -> str | None:
    full = 1 - pattern.keep / pattern.of
    if c.allocation != "global":
        return f"{pattern} fixes how many weights every tensor loses, so no allocation applies: leave allocation out"
    if c.caps:
        return f"{pattern} fixes how many weights every tensor loses, so {CAPS} do not apply"
    if c.threshold is not None:
        return f"{pattern} fixes how many weights every tensor loses, so a threshold does not apply"
    if c.sparsity is not None and abs(c.sparsity - full) > 1e-9:
        return f"{pattern} means sparsity {full:g}; got sparsity={c.sparsity}. Leave sparsity out"
    return None


def _threshold(c: Choice) -> str | None:
    if c.sparsity is not None:
        return "sparsity and threshold are two answers to one question: give one of them"
    if c.allocation != "global":
        return "a threshold decides every count itself, so no allocation applies: leave allocation out"
    if c.caps:
        return f"a threshold decides every count itself, so {CAPS} do not apply"
    if c.criterion is not magnitude:
        return "a threshold is a magnitude: leave criterion out"
    if not isinstance(c.pattern, Unstructured):
        return f"a threshold compares single weights, not {c.pattern} units: leave pattern out"
    return None


def _lamp(c: Choice) -> str | None:
    if c.criterion is not magnitude:
        return "LAMP is defined on magnitudes: leave criterion out, or choose another allocation"
    if not isinstance(c.pattern, Unstructured):
        return f"LAMP scores single weights, not {c.pattern} units: choose another allocation"
    if c.nonfinite != "error":
        return "LAMP sums squares, so every weight must be finite: leave nonfinite out, or choose another allocation"
    return None
