"""Everything public that can be chosen, in one table. The contract tests run every combination of it.

A new pattern, allocation, criterion or dtype is tested by adding one line here; `test_table.py` fails until it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

import secateur
from secateur.core.combine import Choice, why_refused
from secateur.core.heads import Head
from secateur.core.plan import Row
from secateur.core.spelling import allocation_of, criterion_of

T = TypeVar("T")

PATTERNS: dict[str, Any] = {
    "unstructured": secateur.Unstructured(),
    "row": secateur.Row(),
    "2:4": secateur.NM(keep=2, of=4),
    "4x4": secateur.Block((4, 4)),
    "channel": secateur.Channel("out"),
    "channel:in": secateur.Channel("in"),
}


OF_ATTENTION: dict[str, Any] = {"head:4": Head(4)}
"""Patterns of attention alone, which `test_heads.py` runs on a network of its own."""


def half_of_each(rows: tuple[Row, ...], sparsity: float) -> dict[str, int]:
    """A user's allocation: half as much of each tensor as is asked."""
    return {r.name: int(r.numel * sparsity / 2) for r in rows}


ALLOCATIONS: dict[str, Any] = {
    "global": "global",
    "uniform": "uniform",
    "uniform_plus": "uniform_plus",
    "er": "er",
    "erk": "erk",
    "lamp": "lamp",
    "mapping": {"conv": 0.25, "fc*": 0.75},
    "function": half_of_each,
}


@secateur.elementwise
def signed(weight: Tensor) -> Tensor:
    """A user's criterion of single weights: the most negative go first."""
    return torch.nan_to_num(weight.double(), nan=0.5)


def centred(weight: Tensor, *, name: str, index: Tensor) -> Tensor:
    """A user's criterion of whole tensors: distance to the mean of the finite weights; takes all that is offered."""
    assert name
    assert index.shape == weight.shape
    values = weight.double()
    finite = torch.isfinite(values)
    return torch.where(finite, (values - values[finite].mean()).abs(), 0.5)


CRITERIA: dict[str, Any] = {
    "magnitude": "magnitude",
    "random": secateur.random(3),
    "elementwise": signed,
    "function": centred,
}

DTYPES: dict[str, torch.dtype | tuple[torch.dtype, ...]] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
    "mixed": (torch.bfloat16, torch.float32, torch.float8_e4m3fn),
}

NONFINITE = ("error", "keep", "prune")
CAPS: dict[str, dict[str, Any]] = {
    "free": {},
    "capped": {"max_sparsity": {"fc2": 0.5}, "min_keep": 40},
}
AMOUNTS = ("sparsity", "threshold", "both", "neither")

CHOICES = list(product(PATTERNS, ALLOCATIONS, CRITERIA))
"""Every combination of pattern, allocation and criterion, by name."""


@dataclass(frozen=True)
class Case:
    """One combination of all there is to choose, by name."""

    pattern: str
    allocation: str
    criterion: str
    amount: str = "sparsity"
    nonfinite: str = "error"
    caps: str = "free"

    def __str__(self) -> str:
        return f"{self.pattern}-{self.allocation}-{self.criterion}-{self.amount}-{self.nonfinite}-{self.caps}"

    @property
    def sparsity(self) -> float | None:
        """What is asked in this case; N:M leaves it out."""
        if self.amount not in ("sparsity", "both") or self.pattern == "2:4":
            return None
        return 0.4

    @property
    def threshold(self) -> float | None:
        """What is asked in this case."""
        return 0.5 if self.amount in ("threshold", "both") else None

    def why_refused(self) -> str | None:
        """What the code says of it."""
        return why_refused(
            Choice(
                (PATTERNS | OF_ATTENTION)[self.pattern], allocation_of(ALLOCATIONS[self.allocation]),
                criterion_of(CRITERIA[self.criterion]), self.nonfinite, self.sparsity, self.threshold,
                self.caps == "capped",
            )
        )  # fmt: skip

    def asked(self, sparsity: float | None = None) -> dict[str, Any]:
        """The arguments of `secateur.prune`; ``sparsity`` instead of the case's own, where it has one."""
        own = self.sparsity if sparsity is None or self.sparsity is None else sparsity
        return {
            "sparsity": own, "threshold": self.threshold, "pattern": PATTERNS[self.pattern],
            "allocation": ALLOCATIONS[self.allocation], "criterion": CRITERIA[self.criterion],
            "nonfinite": self.nonfinite, **CAPS[self.caps],
        }  # fmt: skip


def default_of(pattern: str) -> str:
    """The allocation that a pattern has where none is named."""
    return "uniform" if pattern == "row" else "global"


def amounts_of(pattern: str, allocation: str) -> tuple[str, ...]:
    """How an amount can be given: only patterns and mappings that say it themselves leave it out."""
    says_itself = pattern == "2:4" or allocation == "mapping"
    return AMOUNTS if says_itself else AMOUNTS[:3]


EVERYTHING = [
    Case(p, a, c, amount, nonfinite, caps)
    for p, a, c in CHOICES
    for amount, nonfinite, caps in product(amounts_of(p, a), NONFINITE, CAPS)
]
"""Every combination of all that can be chosen."""

DEFINED = [case for case in EVERYTHING if case.why_refused() is None]
REFUSED = [case for case in EVERYTHING if case.why_refused() is not None]
PLAIN = [case for case in DEFINED if (case.amount, case.nonfinite, case.caps) == ("sparsity", "error", "free")]
"""The defined ones without thresholds, caps or values that are not finite."""


def in_turn(case: Case, choices: Sequence[T], step: int = 0) -> Sequence[T]:
    """All the choices by magnitude or for the default allocation; one in turn for the rest, enough for all together."""
    if case.allocation == default_of(case.pattern) or case.criterion == "magnitude":
        return choices
    return [choices[(PLAIN.index(case) + step) % len(choices)]]


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Where tensors may be left with nothing, or norms fire: other warnings remain errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", secateur.SecateurWarning)
        yield


def ids(values: Mapping[str, Any] | list[Case]) -> list[str] | Callable[[Case], str]:
    """Names for pytest."""
    return list(values) if isinstance(values, Mapping) else str
