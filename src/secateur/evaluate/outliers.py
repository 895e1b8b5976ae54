"""How many outlying weights each block of a network has, for `secateur.OWL`, from one look at the dense network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from secateur.core.owl import OWL, outliers
from secateur.core.patterns import Unstructured
from secateur.core.plan import Row
from secateur.core.saliency import wanda
from secateur.core.types import Spec
from secateur.stores.memory import MemoryStore

from .blocks import Block
from .calibrate import Calibration, measure


def outlier_counts(
    how: OWL, model: nn.Module, store: MemoryStore, specs: Sequence[Spec], blocks: Sequence[Block], calibration: Calibration,
    rows: Sequence[Row], sparsity: float,
) -> dict[str, int]:  # fmt: skip
    """How many weights each tensor loses.

    Args:
        how: the allocation.
        model, store, calibration: the dense network, its tensors, and what is run.
        specs: the tensors to prune.
        blocks: those of the network; a tensor that lies in none is a block of its own.
        rows: of the tensors, with their zeros.
        sparsity: of all together.
    """
    held = {b.name: [s for s in specs if b.holds(s.name)] for b in blocks}
    held |= {s.name: [s] for s in specs if not any(b.holds(s.name) for b in blocks)}
    held = {name: some for name, some in held.items() if some}
    norms = measure(model, store, specs, calibration, ("input_norm",), Unstructured(), [])

    def share(some: Sequence[Spec]) -> float:
        return outliers(lambda: (_scores(store, s, norms) for s in some), how.outlier)

    shares = {name: share(some) for name, some in held.items()}
    return how.counts(
        shares, {name: [s.name for s in some] for name, some in held.items()}, {r.name: r.numel for r in rows},
        {r.name: r.zeros or 0 for r in rows}, sparsity,
    )  # fmt: skip


def _scores(store: MemoryStore, spec: Spec, norms: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    assert spec.in_dim is not None
    return wanda(store.entry(spec).tensor.detach(), input_norm=norms[spec.name]["input_norm"], in_dim=spec.in_dim)
