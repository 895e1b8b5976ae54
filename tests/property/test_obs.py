"""OBS and ExactOBS against brute force: every weight tried, every survivor refitted on the inputs themselves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.patterns import NM, Unstructured
from secateur.core.solve.obs import OBS, ExactOBS
from tests.property import layers, oracles
from tests.property.test_sparsegpt import fills, worlds

FREE = Unstructured()
SOLVERS = [OBS, ExactOBS]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.__name__)


@solvers
@pytest.mark.parametrize("c", [1.0, 0.3, 1e-12])
@pytest.mark.parametrize("fill", ["normal", "ties", "equal", "sparse"])
def test_with_equal_inputs_it_is_magnitude(solver: type[OBS] | type[ExactOBS], c: float, fill: str) -> None:
    w = fills(fill, (7, 11)).float()
    for count in (0, 1, 30, 50, 77):
        found = solver()(w, hessian=c * torch.eye(11), pattern=FREE, count=count)
        np.testing.assert_array_equal((~found.mask).numpy().reshape(-1), oracles.smallest({"w": w}, count)["w"])
        assert torch.equal(found.weight, w.double().masked_fill(~found.mask, 0.0))


def test_with_equal_inputs_groups_are_those_of_magnitude() -> None:
    for fill in ("normal", "ties", "equal", "sparse"):
        w = fills(fill, (5, 18)).float()
        found = ExactOBS()(w, hessian=0.3 * torch.eye(18), pattern=NM(2, 6), count=60)
        np.testing.assert_array_equal((~found.mask).numpy().reshape(-1), oracles.nm(w, 1, 2, 6))


@solvers
@pytest.mark.parametrize("seed", range(6))
def test_the_first_to_go_is_the_one_whose_loss_least_squares_mends_best(
    solver: type[OBS] | type[ExactOBS], seed: int
) -> None:
    d = layers.draw(3, 4 + seed, seed)
    costs = {}
    for row in range(3):
        for j in range(4 + seed):
            after = d.weight.clone()
            after[row] = layers.fitted(d.x, d.weight[row], layers.without(4 + seed, [j]))
            costs[row, j] = layers.error(d.x, d.weight, after), after
    row, j = min(costs, key=lambda at: costs[at][0])
    found = solver(damping=0.0)(d.weight, hessian=d.hessian, pattern=FREE, count=1)
    assert (~found.mask).nonzero().tolist() == [[row, j]]
    torch.testing.assert_close(found.weight, costs[row, j][1], rtol=0, atol=1e-9)
    assert found.loss == pytest.approx(costs[row, j][0], rel=1e-9)
    assert found.damping == 0.0


@solvers
@pytest.mark.parametrize("seed", range(3))
def test_every_step_of_a_row_is_that_of_brute_force(solver: type[OBS] | type[ExactOBS], seed: int) -> None:
    d = layers.draw(1, 9, seed)
    order = layers.greedy(d.x, d.weight[0], 9)
    for count in range(1, 10):
        found = solver(damping=0.0)(d.weight, hessian=d.hessian, pattern=FREE, count=count)
        assert set((~found.mask[0]).nonzero().flatten().tolist()) == set(order[:count])
        expected = layers.fitted(d.x, d.weight[0], layers.without(9, order[:count]))
        torch.testing.assert_close(found.weight[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_groups_close_when_they_have_lost_their_share(seed: int) -> None:
    """The greedy order of brute force, passing over groups that are closed."""
    d = layers.draw(1, 12, seed)
    gone: list[int] = []
    for _ in range(6):
        free = [j for j in layers.without(12, gone) if sum(g // 4 == j // 4 for g in gone) < 2]
        costs = {
            j: layers.error(d.x, d.weight, layers.fitted(d.x, d.weight[0], layers.without(12, [*gone, j]))[None])
            for j in free
        }
        gone.append(min(costs, key=costs.__getitem__))
    found = ExactOBS(damping=0.0)(d.weight, hessian=d.hessian, pattern=NM(2, 4), count=6)
    assert set((~found.mask[0]).nonzero().flatten().tolist()) == set(gone)
    expected = layers.fitted(d.x, d.weight[0], layers.without(12, gone))
    torch.testing.assert_close(found.weight[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_two_are_one(seed: int) -> None:
    d = layers.draw(11, 20, seed)
    w = d.weight * (torch.rand(11, 20, generator=torch.Generator().manual_seed(seed)) < 0.9)
    for count in (25, 60, 110, 200):
        a, b = (s()(w, hessian=d.hessian, pattern=FREE, count=count) for s in SOLVERS)
        assert torch.equal(a.mask, b.mask)
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-9)
        assert a.loss == pytest.approx(b.loss, rel=1e-9) and a.damping == b.damping


def twins(rows: int) -> layers.Drawn:
    """A layer where inputs come in pairs that are almost the same: the first of a pair to go costs nothing, the second all.

    So the costs along a row do not rise.
    """
    d = layers.draw(rows, 10, 7)
    x = d.x.repeat_interleave(2, dim=1) + 1e-2 * layers.draw(1, 20, 8, samples=len(d.x)).x
    return layers.Drawn(x, layers.hessian_of(x), layers.draw(rows, 20, 9).weight)


@solvers
def test_a_row_loses_a_prefix_of_its_own_order_also_where_its_costs_fall(solver: type[OBS] | type[ExactOBS]) -> None:
    d = twins(6)
    orders = []
    for row in d.weight:
        masks = [~solver()(row[None], hessian=d.hessian, pattern=FREE, count=k).mask[0] for k in range(21)]
        orders.append([int((b & ~a).nonzero()) for a, b in pairwise(masks)])
    falls = False
    for count in range(0, 121, 7):
        found = solver()(d.weight, hessian=d.hessian, pattern=FREE, count=count)
        lost = (~found.mask).sum(1).tolist()
        assert sum(lost) == count
        for row, k, order in zip(range(6), lost, orders, strict=True):
            assert set((~found.mask[row]).nonzero().flatten().tolist()) == set(order[:k])
    for row, order in zip(d.weight, orders, strict=True):
        errors = [
            layers.error(d.x, row[None], layers.fitted(d.x, row, layers.without(20, order[:k]))[None])
            for k in range(21)
        ]
        steps = np.diff(errors)
        falls |= bool((np.diff(steps) < -1e-3).any())
    assert falls, "this layer was meant to have a row whose costs fall"


@settings(max_examples=60)
@given(worlds(), st.data())
def test_the_count_is_exact(world: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    w, h = world
    count = data.draw(st.integers(0, w.numel()))
    zero, dead = w == 0, (h.diagonal() == 0).expand_as(w)
    for solver in SOLVERS:
        found = solver()(w, hessian=h, pattern=FREE, count=count)
        gone = ~found.mask
        assert int(gone.sum()) == max(count, int(zero.sum()))
        assert bool(gone[zero].all())
        free, cheap = int((zero | dead).sum()), int((gone & (zero | dead)).sum())
        assert cheap == (free if count >= free else int(gone.sum()))
        assert not bool(found.weight[gone].signbit().any()) and not bool((found.weight[gone] != 0).any())
        assert torch.equal(found.weight[found.mask & dead], w.double()[found.mask & dead])


@settings(max_examples=60)
@given(st.data())
def test_groups_lose_their_share_and_no_more(data: st.DataObject) -> None:
    of, n, rows = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    keep = data.draw(st.integers(1, of - 1))
    numbers = st.lists(st.sampled_from([0.0, 0.5, -1.0, 2.0]), min_size=rows * n * of, max_size=rows * n * of)
    w = torch.tensor(data.draw(numbers)).view(rows, n * of)
    h = layers.draw(1, n * of, 0).hessian
    found = ExactOBS()(w, hessian=h, pattern=NM(keep, of), count=rows * n * (of - keep))
    lost = (~found.mask).view(-1, of).sum(1)
    assert torch.equal(lost, (w == 0).view(-1, of).sum(1).clamp(min=of - keep))
    assert not bool((found.mask & (w == 0)).any())


@pytest.mark.parametrize("rows", [1, 7])
def test_batches_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.core.solve import least_squares, obs

    d = layers.draw(7, 24, 4)
    for pattern in (FREE, NM(2, 4)):
        whole = ExactOBS()(d.weight, hessian=d.hessian, pattern=pattern, count=84)
        with monkeypatch.context() as patch:
            patch.setattr(obs, "BATCH", rows * 24 * 24)
            patch.setattr(least_squares, "BATCH", rows * 24 * 24)
            parts = ExactOBS()(d.weight, hessian=d.hessian, pattern=pattern, count=84)
        assert torch.equal(parts.mask, whole.mask)
        torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-11)


def test_zeros_stay_when_more_is_asked_and_all_stays_when_less_is() -> None:
    d = layers.draw(8, 16, 0)
    for solver in SOLVERS:
        once = solver()(d.weight, hessian=d.hessian, pattern=FREE, count=60)
        less = solver()(once.weight, hessian=d.hessian, pattern=FREE, count=40)
        assert torch.equal(less.weight, once.weight) and torch.equal(less.mask, once.mask)
        more = solver()(once.weight, hessian=d.hessian, pattern=FREE, count=100)
        assert int((more.weight == 0).sum()) == 100 and not bool((more.mask & ~once.mask).any())
