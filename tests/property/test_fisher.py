"""Blocks of the Fisher matrix: their inverses and the update of the survivors, against dense matrices of NumPy, the recursion of
the papers, and the minimum of the quadratic found another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import secateur
from secateur.core.solve import fisher
from secateur.core.solve.fisher import (
    add_gradients,
    diagonal,
    fisher_bytes,
    invert,
    outer_products,
    update_survivors,
    woodfisher,
)
from secateur.errors import BadInput, BadTensor


def drawn(count: int, numel: int, seed: int) -> Tensor:
    """Gradients that share directions, of sizes that differ."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(numel, numel, generator=g, dtype=torch.float64) / numel**0.5
    return torch.randn(count, numel, generator=g, dtype=torch.float64) @ mix


def inverse_of(gradients: Tensor, block: int, damping: float) -> Tensor:
    total = outer_products(gradients.shape[1], block)
    add_gradients(total, gradients)
    assert invert(total, len(gradients), damping) == damping
    return total


def matrices(gradients: Tensor, block: int, damping: float) -> list[tuple[slice, np.ndarray]]:
    """The weights of each block, and its damped Fisher matrix."""
    g, out = gradients.numpy(), []
    for start in range(0, g.shape[1], min(block, g.shape[1])):
        part = g[:, start : start + block]
        out.append((slice(start, start + part.shape[1]), part.T @ part / len(g) + damping * np.eye(part.shape[1])))
    return out


SIZES = st.integers(1, 40), st.integers(1, 12), st.integers(1, 30), st.integers(0, 10**6)


@given(*SIZES)
def test_inverses_are_those_of_dense_matrices(numel: int, block: int, count: int, seed: int) -> None:
    g = drawn(count, numel, seed)
    found = inverse_of(g, block, 1e-2)
    assert found.numel() * 8 == fisher_bytes(numel, block)
    flat = diagonal(found, torch.empty(numel))
    for number, (some, f) in enumerate(matrices(g, block, 1e-2)):
        width = len(f)
        np.testing.assert_allclose(found[number, :width, :width], np.linalg.inv(f), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(flat[some], np.linalg.inv(f).diagonal(), rtol=1e-8)


def test_the_inverse_is_that_of_the_papers_recursion() -> None:
    """One rank-1 step a gradient, from I / λ on."""
    m, damping = 30, 1e-3
    g = drawn(m, 8, 0)
    inverse = torch.eye(8, dtype=torch.float64) / damping
    for row in g:
        pulled = inverse @ row
        inverse -= torch.outer(pulled, pulled) / (m + row @ pulled)
    torch.testing.assert_close(inverse_of(g, 8, damping)[0], inverse, rtol=1e-8, atol=1e-6)


def test_groups_of_blocks_and_of_gradients_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    g, w = drawn(9, 23, 1), drawn(1, 23, 2)[0]
    mask = torch.arange(23) % 3 == 0
    whole = inverse_of(g, 4, 1e-3)
    monkeypatch.setattr(fisher, "AT_ONCE", 2 * 4 * 4)
    parts = outer_products(23, 4)
    for row in g:
        add_gradients(parts, row[None])
    invert(parts, 9, 1e-3)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=0)
    few = update_survivors(w, mask, whole)
    monkeypatch.undo()
    torch.testing.assert_close(update_survivors(w, mask, whole), few, rtol=1e-12, atol=0)


@given(*SIZES, st.floats(0, 1))
def test_the_update_is_the_minimum(numel: int, block: int, count: int, seed: int, share: float) -> None:
    """Over the survivors the quadratic has one minimum: ``F_SS δ_S = F_SQ w_Q``."""
    g = drawn(count, numel, seed)
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(numel, generator=draw, dtype=torch.float64)
    w[torch.rand(numel, generator=draw) < 0.2] = 0.0  # pruned before
    mask = torch.rand(numel, generator=draw) >= share
    new = update_survivors(w, mask, inverse_of(g, block, 1e-2))
    gone = (~mask | (w == 0)).numpy()
    for some, f in matrices(g, block, 1e-2):
        q, old, now = gone[some], w[some].numpy(), new[some].numpy()
        expected = np.zeros_like(old)
        if not q.all():
            expected[~q] = old[~q] + np.linalg.solve(f[np.ix_(~q, ~q)], f[np.ix_(~q, q)] @ old[q])
        np.testing.assert_allclose(now, expected, rtol=1e-7, atol=1e-9)
        for step in np.random.default_rng(0).normal(size=(20, len(old))) * 1e-3:
            other = np.where(q, 0, now + step)
            assert cost(f, other - old) >= cost(f, now - old) * (1 - 1e-9)
    assert (new == 0).tolist() == gone.tolist()
    assert not torch.signbit(new[torch.from_numpy(gone)]).any()


def cost(f: np.ndarray, delta: np.ndarray) -> float:
    return float(0.5 * delta @ f @ delta)


@given(st.integers(2, 10), st.integers(0, 10**6))
def test_of_a_single_weight_it_is_the_surgeons(numel: int, seed: int) -> None:
    g, q = drawn(20, numel, seed), seed % numel
    inverse = inverse_of(g, numel, 1e-2)
    w = drawn(1, numel, seed + 1)[0]
    mask = torch.arange(numel) != q
    expected = w - w[q] / inverse[0, q, q] * inverse[0, :, q]
    found = update_survivors(w, mask, inverse)
    torch.testing.assert_close(found[mask], expected[mask])
    (_, f), *_ = matrices(g, numel, 1e-2)
    score = secateur.criteria.woodfisher(w, fisher_inverse_diag=diagonal(inverse, w))[q]
    assert cost(f, (found - w).numpy()) == pytest.approx(float(score))


def test_together_they_cost_less_than_the_sum_of_single_updates() -> None:
    g, w = drawn(60, 20, 3), drawn(1, 20, 4)[0]
    inverse = inverse_of(g, 20, 1e-3)
    mask = torch.arange(20) % 2 == 0
    (_, f), *_ = matrices(g, 20, 1e-3)
    single = w.clone()
    for q in (~mask).nonzero().flatten().tolist():
        single -= w[q] / inverse[0, q, q] * inverse[0, :, q]
    single[~mask] = 0
    plain = torch.where(mask, w, 0.0)
    costs = [cost(f, (x - w).numpy()) for x in (update_survivors(w, mask, inverse), single, plain)]
    assert costs[0] < 0.9 * min(costs[1:])


def test_the_solver_tells_what_the_model_of_the_loss_foresees() -> None:
    g, w = drawn(60, 20, 5), drawn(1, 20, 6)[0].view(4, 5)
    mask = torch.arange(20).view(4, 5) % 3 == 0
    inverse = inverse_of(g, 7, 1e-3)
    solved = woodfisher(w, fisher_inverse=inverse, mask=mask)
    foreseen = 0.0
    for some, f in matrices(g, 7, 1e-3):
        q = (~mask).flatten()[some].numpy()
        gone = w.flatten()[some].numpy()[q]
        foreseen += 0.5 * gone @ np.linalg.solve(np.linalg.inv(f)[np.ix_(q, q)], gone)
    assert solved.loss == pytest.approx(foreseen, rel=1e-6)
    assert torch.equal(solved.mask, mask) and solved.damping is None
    assert torch.equal(solved.weight, update_survivors(w, mask, inverse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    g, w = drawn(60, 30, 7), drawn(1, 30, 8)[0].to(dtype)
    mask = torch.arange(30) % 4 != 0
    inverse = inverse_of(g, 30, 1e-2)
    found = update_survivors(w, mask, inverse)
    assert found.dtype == dtype
    assert torch.equal(found, update_survivors(w.double(), mask, inverse).to(dtype))


def test_survivors_do_not_move_where_gradients_have_nothing_in_common() -> None:
    g = torch.eye(6, dtype=torch.float64).repeat(4, 1) * torch.arange(1.0, 7.0)
    w = drawn(1, 6, 9)[0]
    mask = torch.tensor([True, False] * 3)
    assert torch.equal(update_survivors(w, mask, inverse_of(g, 6, 1e-3)), torch.where(mask, w, 0.0))


def test_a_survivor_that_would_round_to_zero_keeps_its_value() -> None:
    """Zeros are counted: one more would be one weight too many."""
    inverse = inverse_of(torch.tensor([[1.0, 1.0]], dtype=torch.float64), 2, 1e-3)
    w = torch.tensor([2e-7, -2e-7], dtype=torch.float16)
    assert update_survivors(w, torch.tensor([True, False]), inverse).tolist() == [float(w[0]), 0.0]


def test_an_update_that_does_not_fit_the_dtype_is_refused() -> None:
    g = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    w = torch.tensor([1.0, 60000.0], dtype=torch.float16)
    with pytest.raises(BadTensor, match=r"'fc.weight' \(shape \(2,\), float16\) has values that float16 cannot hold"):
        update_survivors(w, torch.tensor([True, False]), inverse_of(g, 2, 1e-6), "fc.weight")


def test_bad_input_is_refused() -> None:
    for damping in (0, -1.0, math.nan, math.inf, True, "1e-5", None):
        with pytest.raises(BadInput, match="a number above 0"):
            invert(outer_products(4, 2), 1, damping)  # type: ignore[arg-type]
    total = outer_products(4, 2)
    add_gradients(total, torch.full((1, 4), math.inf))
    with pytest.raises(BadInput, match="not finite"):
        invert(total, 1, 1e-5)


def test_damping_is_raised_until_a_block_has_an_inverse() -> None:
    g = 1e8 * drawn(3, 12, 10)
    total = outer_products(12, 6)
    add_gradients(total, g)
    used = invert(total, 3, 1e-5)
    assert used > 1e-5 and math.log10(used / 1e-5) == pytest.approx(round(math.log10(used / 1e-5)))
    again = outer_products(12, 6)
    add_gradients(again, g)
    assert invert(again, 3, used) == used
    assert torch.equal(total, again)


def test_an_empty_tensor_has_no_blocks() -> None:
    total = outer_products(0, 50)
    add_gradients(total, torch.empty(3, 0))
    assert invert(total, 3, 1e-5) == 1e-5
    assert update_survivors(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.bool), total).shape == (0, 4)


# Through the verb


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))


def test_the_verb_prunes_by_the_criterion_and_moves_what_stays() -> None:
    data = [(torch.randn(1, 12), torch.randint(0, 4, (1,))) for _ in range(80)]

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1])

    calibration = secateur.Calibration(data, loss=loss, block=30, damping=1e-3)
    dense, masked, moved = net(), net(), net()
    measured = secateur.calibrate(dense, calibration, ["fisher_inverse"])
    secateur.prune(masked, 0.8, criterion="woodfisher", calibration=calibration)
    report = secateur.prune(moved, 0.8, solver="woodfisher", calibration=calibration)
    assert report.zeros == round(0.8 * 160)
    for name, keep in secateur.masks(masked).items():
        w = moved.get_parameter(name)
        assert torch.equal(w != 0, keep)
        assert torch.equal(w, update_survivors(dense.get_parameter(name), keep, measured[name]["fisher_inverse"]))
        assert not torch.equal(w, masked.get_parameter(name))
    # Again and sparser, with the Fisher matrix of the network as it is then: what is zero stays zero.
    before = secateur.masks(moved)
    assert secateur.prune(moved, 0.9, solver="woodfisher", calibration=calibration).zeros == 144
    assert all(not (m & ~before[n]).any() for n, m in secateur.masks(moved).items())
