"""What is asked of a plan: every choice resolved and checked in one value, before the target is looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from secateur.errors import BadInput, NotDefined

from .allocate import check_sparsity
from .combine import Choice, why_refused
from .criteria import Criterion, describe, magnitude
from .heads import UnitPattern
from .patterns import NM, Pattern, Row
from .saliency import is_wanda
from .spelling import Allocation, allocation_of, criterion_of, describe_allocation, pattern_of

NONFINITE = ("error", "keep", "prune")


@dataclass(frozen=True)
class Request:
    """What is asked of a plan, resolved and checked; see `secateur.prune` for the meaning of each."""

    sparsity: float | None
    threshold: float | None
    criterion: Criterion
    allocation: Allocation
    pattern: Pattern
    max_sparsity: float | Mapping[str, float] | None
    min_keep: int
    nonfinite: Literal["error", "keep", "prune"]

    @staticmethod
    def of(
        sparsity: Any = None, *, threshold: Any = None, criterion: Any = "magnitude", allocation: Any = None,
        pattern: Any = None, max_sparsity: Any = None, min_keep: Any = 0, nonfinite: Any = "error",
        on_the_way: bool = False, data: bool = False,
    ) -> Request:  # fmt: skip
        """Resolves short forms and refuses what cannot be meant.

        ``on_the_way``: a step of a schedule, at which N:M is given a smaller count than its full one. ``data``: statistics
        will be measured, so a criterion may ask for some.

        Raises:
            BadInput: a value out of range or unknown.
            NotDefined: choices that have no meaning together.
        """
        if sparsity is not None:
            sparsity = check_sparsity(sparsity)
        if threshold is not None:
            threshold = _check_threshold(threshold)
        if isinstance(max_sparsity, Mapping):
            _check_table(max_sparsity, "max_sparsity")
        elif max_sparsity is not None:
            check_sparsity(max_sparsity, "max_sparsity")
        if isinstance(min_keep, bool) or not isinstance(min_keep, int) or min_keep < 0:
            raise BadInput(f"min_keep is a count of weights, an int >= 0; got {min_keep!r}.")
        if nonfinite not in NONFINITE:
            raise BadInput(f"nonfinite must be one of {', '.join(NONFINITE)}; got {nonfinite!r}.")
        c = criterion_of(criterion, data)
        p = pattern_of(pattern if pattern is not None else "row" if is_wanda(c) else "unstructured")
        a = allocation_of(allocation if allocation is not None else "uniform" if isinstance(p, Row) else "global", data)
        if isinstance(a, Mapping):
            _check_table(a, "allocation")
        caps = max_sparsity is not None or min_keep > 0
        partly = on_the_way and isinstance(p, NM)
        if reason := why_refused(Choice(p, a, c, nonfinite, None if partly else sparsity, threshold, caps)):
            raise NotDefined(reason + ".")
        if isinstance(p, NM):
            full = 1 - p.keep / p.of
            if partly and sparsity is not None and sparsity > full + 1e-9:
                raise NotDefined(f"{p} means sparsity {full:g} at the most; the schedule asks for {sparsity}.")
            sparsity = sparsity if partly and sparsity is not None and sparsity < full - 1e-9 else full
        if sparsity is None and threshold is None and not isinstance(a, Mapping):
            raise BadInput("say how much to prune: sparsity=0.9 (a fraction), or threshold=1e-3 (a magnitude).")
        if isinstance(p, UnitPattern) and p.reduce is None:
            # A norm belongs to magnitudes: squares lose the sign of other scores.
            p = replace(p, reduce="l2" if a != "global" and c is magnitude else "mean")
        return Request(sparsity, threshold, c, a, p, max_sparsity, min_keep, nonfinite)

    def asked(self) -> dict[str, Any]:
        """What is asked, in words and numbers."""
        caps = dict(self.max_sparsity) if isinstance(self.max_sparsity, Mapping) else self.max_sparsity
        return {
            "sparsity": self.sparsity, "threshold": self.threshold, "criterion": describe(self.criterion),
            "allocation": dict(self.allocation) if isinstance(self.allocation, Mapping) else describe_allocation(self.allocation),
            "pattern": str(self.pattern), "reduce": getattr(self.pattern, "reduce", None), "max_sparsity": caps,
            "min_keep": self.min_keep, "nonfinite": self.nonfinite,
        }  # fmt: skip


def _check_table(table: Mapping[str, float], what: str) -> None:
    for glob, value in table.items():
        if not isinstance(glob, str):
            raise BadInput(f"{what} maps globs over names to sparsities; {glob!r} is not a string.")
        check_sparsity(value, f"{what}[{glob!r}]")


def _check_threshold(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or type(value).__module__ == "numpy":
        raise BadInput(f"threshold must be a Python number > 0, got {value!r} ({type(value).__name__}).")
    if not 0 < value < math.inf:
        raise BadInput(
            f"threshold is a magnitude, 0 < threshold < inf: weights with |w| < threshold go; got {value!r}."
        )
    return float(value)
