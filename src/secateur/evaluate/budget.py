"""From measured sensitivities to counts: which layer gives how much, so that a budget is met at the least predicted loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, get_args

from secateur.core.allocate import Bounds, check_sparsity, level_counts, prune_count
from secateur.core.patterns import NM
from secateur.core.plan import Row
from secateur.core.spelling import pattern_of
from secateur.errors import BadInput, Infeasible, NotDefined

from .spend import Curve, cheapest

if TYPE_CHECKING:
    from .flops import Flops
    from .sensitivity_facts import Layer, Piece, Sensitivity

Budget = Literal["weights", "flops", "bytes"]
ASSUMED = (
    "assumed: what layers lose adds up, and between the measured sparsities it rises in straight lines; measure the network "
    "that comes out"
)


@dataclass(frozen=True)
class Allocation:
    """How many weights each tensor loses; made by `Sensitivity.allocation`, and taken by `secateur.prune` as its allocation.

    Attributes:
        sparsity: the share of the weights that will be zero; what to hand to `secateur.prune` beside it.
        counts: name of each tensor to its number of zeros.
        loss: the predicted loss in the metric, summed over the layers.
        budget, asked: what was to be met.
        scan: the measurements it was made from.

    Called with rows and a sparsity, as the core calls an allocation, it answers for a budget of weights at any
    sparsity, counting from the zeros there are: so it also goes with a schedule.
    """

    sparsity: float
    counts: Mapping[str, int]
    loss: float
    budget: Budget
    asked: float
    scan: Sensitivity = field(repr=False, compare=False)

    __name__ = "sensitivity"  # what plans and reports call it

    def __call__(self, rows: Sequence[Row], sparsity: float) -> dict[str, int]:
        """The counts for the rows of a plan.

        Raises:
            BadInput: rows of other tensors than those that were measured; or another sparsity than that of the FLOPs or
                bytes it was made for.
            Infeasible: a sparsity beyond what was measured.
        """
        pieces = {p.name: p for layer in usable(self.scan) for p in layer.pieces}
        sizes = {name: p.numel for name, p in pieces.items()}
        found = {r.name: r.numel for r in rows}
        if found != sizes:
            odd = sorted({*found.items()} ^ {*sizes.items()})
            raise BadInput(
                f"this allocation was measured on other tensors: {', '.join(sorted({n for n, _ in odd})[:6])} are not the same "
                "here and there. Prune the same model with the same include, ignore and pattern, or measure again."
            )
        zeros = {r.name: r.zeros or 0 for r in rows}
        total = prune_count(sum(sizes.values()), sparsity)
        if total == sum(self.counts.values()) and all(self.counts[n] >= z for n, z in zeros.items()):
            return dict(self.counts)
        if self.budget != "weights":
            raise BadInput(
                f"this allocation was made for a budget of {self.budget}, which it meets at sparsity={self.sparsity!r} only; "
                f"got {sparsity!r}."
            )
        return _weights(self.scan, total, zeros)

    @property
    def shares(self) -> dict[str, float]:
        """The same as sparsities by name, for a recipe or a file: a mapping that is rounded to these very counts."""
        sizes = {p.name: p.numel for layer in usable(self.scan) for p in layer.pieces}
        # Of a tensor that is to be wholly zero a quarter of a weight is left, which is rounded away: 1 is no sparsity.
        return {n: min(c, sizes[n] - 0.25) / sizes[n] if sizes[n] else 0.0 for n, c in self.counts.items()}

    def __str__(self) -> str:
        from secateur.report.sensitivity_words import allocation_text

        return allocation_text(self)


def usable(scan: Sensitivity) -> list[Layer]:
    """The layers that pruning would choose: those that can carry the pattern."""
    return [layer for layer in scan.layers if layer.why is None]


def check_budget(share: Any, budget: Any) -> float:
    """Refuses a share or a budget that cannot be meant.

    Raises:
        BadInput: see `Sensitivity.allocation`.
    """
    if budget not in get_args(Budget):
        raise BadInput(f"budget is one of {', '.join(get_args(Budget))}; got {budget!r}.")
    return check_sparsity(share)


def allocate(scan: Sensitivity, share: Any, budget: Any, flops: Flops | None) -> Allocation:
    """See `Sensitivity.allocation`."""
    share = check_budget(share, budget)
    if (flops is None) == (budget == "flops"):
        raise BadInput('flops= goes with budget="flops": what secateur.count_flops(model, example_input) counted.')
    if isinstance(pattern_of(scan.pattern), NM):
        raise NotDefined(f"{scan.pattern} fixes how many weights every tensor loses, so no allocation applies.")
    if not usable(scan):
        raise Infeasible(f"no layer can carry the pattern {scan.pattern}, so there is nothing to allocate.")
    total = sum(layer.numel for layer in usable(scan))
    zeros = {p.name: p.zeros for layer in scan.layers for p in layer.pieces}
    if budget == "weights":
        counts = _weights(scan, prune_count(total, share), zeros)
    else:
        worth, whole = _worth(scan, flops)
        counts = _solved(scan, worth, math.ceil(Fraction(str(share)) * whole), whole, zeros, budget)
    loss = sum(_predicted(scan, layer, counts) for layer in usable(scan))
    return Allocation(sum(counts.values()) / total, counts, loss, budget, share, scan)


def _predicted(scan: Sensitivity, layer: Layer, counts: Mapping[str, int]) -> float:
    return scan.curve(layer).at(sum(counts[p.name] for p in layer.pieces))


def _weights(scan: Sensitivity, total: int, zeros: Mapping[str, int]) -> dict[str, int]:
    """Counts that are ``total`` in all, or as many as are zero already."""
    of = sum(layer.numel for layer in usable(scan))
    worth = {p.name: 1.0 for layer in usable(scan) for p in layer.pieces}
    return _solved(scan, worth, total, of, zeros, "weights")


def _worth(scan: Sensitivity, flops: Flops | None) -> tuple[dict[str, float], int]:
    """What a zero of each tensor saves, and the whole of which a share is to be saved: bytes, or FLOPs where some are given."""
    pieces = [p for layer in usable(scan) for p in layer.pieces]
    if flops is None:
        return {p.name: float(p.bytes) for p in pieces}, sum(p.bytes * p.numel for p in pieces)
    return {p.name: _flops_of(p, flops) / p.numel if p.numel else 0.0 for p in pieces}, flops.total


def _flops_of(piece: Piece, flops: Flops) -> int:
    for name in (piece.name, *piece.aliases):
        if name in flops.by_weight:
            return flops.by_weight[name]
    raise BadInput(
        f"flops does not tell what the products of {piece.name!r} take: count them with secateur.count_flops on this model, on "
        "an input that reaches every layer."
    )


def _solved(
    scan: Sensitivity, worth: Mapping[str, float], need: int, whole: int, zeros: Mapping[str, int], budget: Budget
) -> dict[str, int]:
    """Counts by tensor: layer by layer at the least predicted loss, and in a group the same share of every tensor."""
    layers = [layer for layer in usable(scan) if layer.numel]
    curves = [scan.curve(x).starting(sum(zeros[p.name] for p in x.pieces)) for x in layers]
    gains = [sum(worth[p.name] * p.numel for p in x.pieces) / x.numel for x in layers]
    _refuse_infeasible(curves, gains, need, whole, budget)
    free = [i for i, g in enumerate(gains) if g > 0]
    spent = cheapest([curves[i] for i in free], [gains[i] for i in free], need) if free else []
    chosen = [c.low for c in curves]
    for i, count in zip(free, spent, strict=True):
        chosen[i] = count
    counts = {p.name: 0 for layer in usable(scan) for p in layer.pieces}
    for layer, count in zip(layers, chosen, strict=True):
        limits = [Bounds(zeros[p.name], p.numel) for p in layer.pieces]
        split = level_counts([p.numel for p in layer.pieces], limits, count)
        counts |= {p.name: c for p, c in zip(layer.pieces, split, strict=True)}
    return counts


def _refuse_infeasible(curves: Sequence[Curve], gains: Sequence[float], need: int, whole: int, budget: Budget) -> None:
    most = sum(g * c.high for g, c in zip(gains, curves, strict=True))
    if need <= most * (1.0 if budget == "weights" else 1 + 1e-9):
        return
    what = {"weights": "weights", "flops": "FLOPs", "bytes": "bytes of the values"}[budget]
    raise Infeasible(
        f"{need:,} of {whole:,} {what} are to go, and no layer goes beyond the sparsity it was measured at (with a finite "
        f"metric): that is {int(most):,} at most, a share of {_floor(most / whole)}. Ask for less, or measure the layers at "
        "higher sparsities."
    )


def _floor(share: float) -> str:
    """A share with six digits, never more than it is.

    >>> _floor(0.94999999), _floor(0.5)
    ('0.949999', '0.5')
    """
    return f"{int(share * 1e6) / 1e6:g}"
