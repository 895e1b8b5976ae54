"""Outlier-weighted layer-wise sparsity: blocks with more outlying weights lose less."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import BadInput, Infeasible

from .allocate import Bounds, level_counts, prune_count


@dataclass(frozen=True)
class OWL:
    r"""An allocation from data: the share of outliers in a block, by Wanda's score, decides how much its layers lose.

    With A = |w| ‖x‖ over all weights of block l, ``D_l = share of A > outlier · mean(A)``; the D are scaled to span
    ``[0, 2 · limit]`` and shifted to the mean 0, and block l gets the density ``1 - sparsity + D_l``. All layers of a block get
    the same. The total is exact: the densities move together until it is, where the paper's is near. A layer outside the
    network's blocks, and with ``Calibration(…, blocks="whole")`` every layer, is a block of its own.

    Args:
        outlier: how many times the mean a score must exceed (M in the paper: 5 for LLaMA-7B).
        limit: half of the span of densities (λ in the paper: 0.08).

    Raises:
        BadInput: values that are not positive numbers, or ``limit`` not below 0.5.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> how = {"criterion": "wanda", "allocation": secateur.OWL(outlier=2), "calibration": [torch.randn(32, 8)]}
        >>> secateur.prune(model, 0.5, **how).sparsity
        0.5

    Yin et al., "Outlier weighed layerwise sparsity (OWL)" (arXiv:2310.05175).
    """

    outlier: float = 5.0
    limit: float = 0.08

    def __post_init__(self) -> None:
        for what, value, most in (("outlier", self.outlier, math.inf), ("limit", self.limit, 0.5)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
                raise BadInput(f"OWL: {what} is a number, 0 < {what} < {most:g}; got {value!r}.")

    def counts(self, shares: Mapping[str, float], blocks: Mapping[str, Sequence[str]], sizes: Mapping[str, int],
               zeros: Mapping[str, int], sparsity: float) -> dict[str, int]:  # fmt: skip
        """How many weights each tensor loses.

        Args:
            shares: outliers of each block, in [0, 1].
            blocks: the tensors of each block.
            sizes, zeros: weights of each tensor, and those that are zero already.
            sparsity: of all together.

        Raises:
            Infeasible: a block would be left with less than nothing.
        """
        low, high = min(shares.values()), max(shares.values())
        spread = {b: 2 * self.limit * (s - low) / (high - low) if high > low else 0.0 for b, s in shares.items()}
        mean = sum(spread.values()) / len(spread)
        wanted = {b: sparsity - (d - mean) for b, d in spread.items()}
        if min(wanted.values()) < 0 or max(wanted.values()) > 1:
            raise Infeasible(
                f"OWL spreads sparsities by {self.limit} around {sparsity}, from {min(wanted.values()):.3f} to "
                f"{max(wanted.values()):.3f}, which leaves 0 to 1: give a smaller limit."
            )
        names = sorted(n for some in blocks.values() for n in some)
        block_of = {n: b for b, some in blocks.items() for n in some}
        slopes = [max(1, round(wanted[block_of[n]] * sizes[n])) for n in names]
        limits = [Bounds(zeros[n], sizes[n]) for n in names]
        total = max(prune_count(sum(sizes.values()), sparsity), sum(zeros.values()))
        return dict(zip(names, level_counts(slopes, limits, total), strict=True))


def outliers(scores: Callable[[], Iterable[Tensor]], outlier: float) -> float:
    """The share of scores of one block that exceed ``outlier`` times their mean.

    Args:
        scores: gives those of one tensor after another, so that no more are in memory; called twice.
        outlier: see `OWL`.

    >>> import torch
    >>> outliers(lambda: [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 9.0])], 2.0)
    0.25
    """
    number, total = 0, 0.0
    for s in scores():
        number, total = number + s.numel(), total + float(s.sum(dtype=torch.float64))
    return sum(int((s > outlier * total / number).sum()) for s in scores()) / number
