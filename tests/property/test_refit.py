"""The refit against least squares on the inputs, and the order of all methods by what they do to a layer's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.solve.base import Solver
from secateur.core.solve.least_squares import refit
from secateur.core.solve.obs import ExactOBS
from secateur.core.solve.sparsegpt import SparseGPT
from tests.property import layers


def a_mask(shape: tuple[int, int], seed: int) -> Tensor:
    """Rows that keep from none to all."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < torch.rand(shape[0], 1, generator=g)
    mask[0], mask[-1] = True, False
    return mask


@pytest.mark.parametrize("seed", range(4))
def test_it_is_least_squares_on_the_inputs(seed: int) -> None:
    d = layers.draw(10, 15, seed)
    mask = a_mask((10, 15), seed)
    found = refit(d.weight, hessian=d.hessian, mask=mask)
    for row, v, keep in zip(d.weight, found.weight, mask, strict=True):
        torch.testing.assert_close(v, layers.fitted(d.x, row, keep.nonzero().flatten().tolist()), rtol=0, atol=1e-9)
    assert found.damping == 0.0 and torch.equal(found.mask, mask)
    assert torch.equal(found.weight[0], d.weight[0]), "a row that loses nothing stays as it is"
    assert found.loss == pytest.approx(layers.error(d.x, d.weight, found.weight), rel=1e-9)


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.01, 1.0, 100.0])
def test_it_is_never_worse_than_leaving_the_survivors_alone(share: float) -> None:
    for seed in range(6):
        d = layers.draw(10, 15, seed, samples=(60, 8)[seed % 2])
        mask = a_mask((10, 15), seed)
        found = refit(d.weight.float(), hessian=d.hessian, mask=mask, damping=share)
        w = d.weight.float().double()
        assert layers.error(d.x, w, found.weight) <= layers.error(d.x, w, w * mask) * (1 + 1e-12)


def test_fewer_samples_than_inputs_give_the_optimum_that_is_nearest_to_the_weights() -> None:
    d = layers.draw(6, 15, 1, samples=5)
    mask = a_mask((6, 15), 1)
    found = refit(d.weight, hessian=d.hessian, mask=mask)
    for row, v, keep in zip(d.weight, found.weight, mask, strict=True):
        s = keep.nonzero().flatten()
        nearest = row[s] + torch.linalg.pinv(d.x[:, s]) @ (d.x[:, ~keep] @ row[~keep])
        torch.testing.assert_close(v[s], nearest, rtol=0, atol=1e-4)
    assert 0 < found.damping <= 1e-6 * float(d.hessian.diagonal().mean())


def test_damping_holds_the_weights_where_they_were_and_never_shrinks_them() -> None:
    d = layers.draw(6, 15, 2)
    mask = a_mask((6, 15), 2)
    w = d.weight * mask
    moved = [
        float((refit(d.weight, hessian=d.hessian, mask=mask, damping=share).weight - w).norm())
        for share in (0.0, 0.01, 1.0, 100.0, 1e6)
    ]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-4 * moved[0]
    assert torch.equal(refit(w, hessian=d.hessian, mask=mask, damping=3.0).weight, w)


def test_solvers_leave_nothing_to_refit() -> None:
    """ExactOBS is at the optimum of its mask; SparseGPT is not, since no column makes up for one to its right."""
    d = layers.draw(24, 32, 3)
    for solver in (ExactOBS(), SparseGPT(block=8)):
        found = solver(d.weight, hessian=d.hessian, pattern=Unstructured(), count=384)
        best = refit(d.weight, hessian=d.hessian, mask=found.mask, damping=0.01)
        if isinstance(solver, ExactOBS):
            assert torch.equal(best.weight, found.weight)
        else:
            assert best.loss < found.loss


SOLVERS: list[Solver] = [SparseGPT(), ExactOBS()]


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_the_order_of_the_methods(pattern: Pattern) -> None:
    """The error on the inputs, the mean of 20 drawn layers: ExactOBS <= SparseGPT <= Wanda <= magnitude."""
    errors = []
    for seed in range(20):
        d = layers.draw(32, 48, seed)
        if isinstance(pattern, NM):
            norms = d.x.square().sum(0).sqrt()
            plain, wanda = (layers.grouped(d.weight, s, 4, 2) for s in (d.weight.abs(), d.weight.abs() * norms))
        else:
            gone = layers.stable_first(d.weight.abs(), d.weight == 0, 768)
            plain, wanda = d.weight.masked_fill(gone, 0.0), layers.wanda(d.weight, d.x, 24)
        found = [s(d.weight, hessian=d.hessian, pattern=pattern, count=768).weight for s in SOLVERS]
        assert all(int((v == 0).sum()) == 768 for v in (plain, wanda, *found))
        errors.append([layers.error(d.x, d.weight, v) for v in (plain, wanda, *found)])
    magnitude, wanda_, sparsegpt, exact = torch.tensor(errors).mean(0).tolist()
    assert exact <= sparsegpt <= wanda_ <= magnitude
