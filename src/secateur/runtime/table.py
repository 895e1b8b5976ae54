"""Which layout a pruned matrix gets, or none: where too little is gained, it stays dense.

The steps are where the bytes that are read cross, or where one layout's cost does: a bitmask reads one bit a weight to say
where the others belong, and its cost hardly depends on the density; ``csr`` reads 16 bits for each weight that is stored, and
nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from secateur.core.layouts import MOST_COLUMNS, Layout


@dataclass(frozen=True)
class Table:
    """The densities at which the choice changes.

    Attributes:
        dense: above it a matrix stays dense.
        csr: below it, where a matrix has at most 65,536 columns, it is laid out as ``csr``; between the two as ``bitmask``.
    """

    dense: float = 0.7
    csr: float = 0.12


class Choice(NamedTuple):
    """A layout, or ``None`` for dense, and why."""

    layout: Layout | None
    why: str


def choose(
    out_features: int, in_features: int, density: float, dtype: torch.dtype, table: Table | None = None
) -> Layout | None:
    """The layout a matrix gets, or ``None``: it stays dense.

    Args:
        out_features, in_features: its shape.
        density: share of its elements that are stored.
        dtype: of weight and activations.
        table: where the choice changes.

    Example:
        >>> choose(4096, 4096, 0.99, torch.float32) is None   # next to nothing to leave out
        True
    """
    return decide(out_features, in_features, density, dtype, table).layout


def decide(
    out_features: int, in_features: int, density: float, dtype: torch.dtype, table: Table | None = None
) -> Choice:
    """What `choose` gives, and a sentence that says why."""
    steps = table or Table()
    if density > steps.dense:
        return Choice(None, f"{density:.1%} of it is not zero; it is packed up to {steps.dense:.0%}")
    if density < steps.csr and in_features <= MOST_COLUMNS:
        return Choice("csr", f"less than {steps.csr:.0%} of it is not zero")
    return Choice("bitmask", f"at most {steps.dense:.0%} of it is not zero")
