"""OWL against the paper's code written anew in NumPy; totals exact; equal outliers, layers of their own, zeros already there."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.core.owl import OWL
from secateur.errors import Infeasible
from tests.contract.nets import snapshot
from tests.contract.oracle import wide
from tests.unit.calibrating import batches, facts_of, inputs_of, mlp, norms_of


def densities(shares: list[float], limit: float, sparsity: float) -> np.ndarray:
    """The paper's code: shares of outliers, scaled to span twice the limit, around the density."""
    d = np.array(shares)
    d = (d - d.min()) * (1 / (d.max() - d.min()) * limit * 2)
    return d - np.mean(d) + (1 - sparsity)


def outlier_share(metrics: list[np.ndarray], m: float) -> float:
    """Of one block: how many scores exceed m times their mean, all its layers taken together."""
    flat = np.concatenate([x.ravel() for x in metrics])
    return float((flat > flat.mean() * m).mean())


def blocks_net() -> nn.Sequential:
    """Three blocks of two layers of one size, so that the paper's densities are reached as they are."""
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(3))).double()
    for i, block in enumerate(model):  # heavier tails further on
        block[2].weight.data *= torch.randn(16, 16).abs().pow(i)
    return model


def test_the_papers_densities() -> None:
    model, data = blocks_net(), batches(features=16)
    names = [f"{i}.{j}" for i in range(3) for j in (0, 2)]
    caught = inputs_of(model, names, lambda: [model(x) for x in data])
    score = {n: np.abs(wide(model.get_submodule(n).weight)) * wide(norms_of(caught[n])) for n in names}
    shares = [outlier_share([score[f"{i}.0"], score[f"{i}.2"]], 2.0) for i in range(3)]
    assert len(set(shares)) == 3
    wanted = densities(shares, 0.1, 0.6)
    report = secateur.prune(model, 0.6, criterion="wanda", allocation=OWL(2.0, 0.1), calibration=data)
    for i in range(3):
        for j in (0, 2):
            row = report[f"{i}.{j}.weight"]
            assert abs(row.zeros - (1 - wanted[i]) * 256) <= 1, (i, j)
    assert report.zeros == round(0.6 * 6 * 256)
    assert report.asked["allocation"] == "owl(outlier=2, limit=0.1)"


def test_the_total_is_exact_where_layers_differ_in_size() -> None:
    for sparsity in (0.3, 0.5, 0.77):
        report = secateur.prune(mlp(), sparsity, criterion="wanda", allocation=OWL(1.5), calibration=batches())
        assert report.zeros == round(sparsity * report.total)
        assert len({round(r.sparsity or 0, 2) for r in report.chosen}) > 1


@settings(max_examples=100)
@given(st.data())
def test_counts(data: st.DataObject) -> None:
    """Totals, bounds, one share a block, and more outliers never lose more."""
    names = [f"b{i}" for i in range(data.draw(st.integers(1, 5)))]
    shares = {n: data.draw(st.floats(0, 1, allow_nan=False)) for n in names}
    blocks = {n: [f"{n}.{j}" for j in range(data.draw(st.integers(1, 3)))] for n in names}
    sizes = {t: data.draw(st.integers(50, 400)) for some in blocks.values() for t in some}
    sparsity, limit = data.draw(st.sampled_from([0.3, 0.5, 0.8])), data.draw(st.sampled_from([0.05, 0.1, 0.19]))
    try:
        counts = OWL(5.0, limit).counts(shares, blocks, sizes, dict.fromkeys(sizes, 0), sparsity)
    except Infeasible:
        assert sparsity + 2 * limit > 1 or sparsity - 2 * limit < 0
        return
    assert sum(counts.values()) == round(sparsity * sum(sizes.values()))
    assert all(0 <= counts[t] <= sizes[t] for t in sizes)
    level = {n: [counts[t] / sizes[t] for t in some] for n, some in blocks.items()}
    for a in names:
        assert max(level[a]) - min(level[a]) < 0.05
        for b in names:
            if shares[a] > shares[b] + 1e-6:
                assert min(level[a]) <= max(level[b]) + 0.03


def test_equal_shares_are_uniform() -> None:
    """Where no block has more outliers than another, all lose the same."""
    model, other, data = mlp(), mlp(), batches()
    secateur.prune(model, 0.5, criterion="wanda", allocation=OWL(outlier=1e6), calibration=data)
    secateur.prune(other, 0.5, criterion="wanda", allocation="uniform", calibration=data)
    assert snapshot(model) == snapshot(other)


def test_zeros_that_are_there_count() -> None:
    model = mlp()
    model[2].weight.data[:14] = 0  # 280 of 320
    report = secateur.prune(model, 0.5, criterion="wanda", allocation=OWL(1.5), calibration=batches())
    assert report["2.weight"].zeros == 280 and report.zeros == round(0.5 * report.total)


class Stem(nn.Module):
    """A stem that lies in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(12, 16), nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h).tanh()
        return h


@pytest.mark.parametrize("blocks", ["auto", "whole"])
def test_what_lies_in_no_block_is_one(blocks: str) -> None:
    """Pruned in one go, with the stem as a block of its own; with "whole" every layer is one."""
    torch.manual_seed(0)
    model, data = Stem().double(), batches()
    names = ["stem", "layers.0", "layers.1", "layers.2"]
    caught = inputs_of(model, names, lambda: [model(x) for x in data])
    score = [np.abs(wide(model.get_submodule(n).weight)) * wide(norms_of(caught[n])) for n in names]
    wanted = densities([outlier_share([s], 1.5) for s in score], 0.1, 0.5)
    calibration = secateur.Calibration(data, blocks=blocks, loss=lambda m, x: m(x).square().mean())
    how: dict[str, Any] = {"criterion": "wanda"} if blocks == "whole" else {"criterion": by_magnitude_and_grad}
    report = secateur.prune(model, 0.5, allocation=OWL(1.5, 0.1), calibration=calibration, **how)
    total = sum(s.size for s in score)
    assert report.zeros == round(0.5 * total) == sum(r.zeros or 0 for r in report.chosen)
    raw = np.array([(1 - d) * s.size for d, s in zip(wanted, score, strict=True)])
    level = report.zeros / raw.sum()
    for name, count in zip(names, raw * level, strict=True):
        assert abs((report[f"{name}.weight"].zeros or 0) - count) <= 1


def by_magnitude_and_grad(weight: Tensor, *, grad: Tensor) -> Tensor:
    """A criterion of gradients, which prunes all layers in one go."""
    return weight.abs() + grad.abs()


def test_it_goes_with_a_solver_and_leaves_the_model() -> None:
    model, data = mlp(), batches()
    facts, other = facts_of(model), copy.deepcopy(model)
    report = secateur.prune(model, 0.5, solver="sparsegpt", allocation=OWL(1.5), calibration=data)
    asked = secateur.prune(other, 0.5, criterion="wanda", allocation=OWL(1.5), calibration=data)
    assert {r.name: r.zeros for r in report.chosen} == {r.name: r.zeros for r in asked.chosen}
    assert facts_of(model) == facts
