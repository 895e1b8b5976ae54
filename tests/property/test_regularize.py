"""The proximal steps are the proximal operators: the minimum of ``0.5 * (x - w)**2 + penalty(x)``, found in no other way here.

That objective is strongly convex, so x is its minimum exactly if ``f(c) - f(x) >= 0.5 * ||c - x||**2`` for every c.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur import regularize
from secateur.train.regularize import How

WEIGHTS = st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0]) | st.floats(-3, 3, width=32), min_size=12, max_size=12)
SIZES = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 2, width=32)


def stepped(w: Tensor, lr: float, *hows: How) -> Tensor:
    """The weight ``(out, in)`` after one update of SGD without a gradient."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = nn.Parameter(w.clone())
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for how in hows:
        regularize.attach(layer, optimizer, how)
    layer.weight.grad = torch.zeros_like(w)
    optimizer.step()
    return layer.weight.detach()


def candidates(w: Tensor, x: Tensor) -> list[Tensor]:
    """Points all around: on a line through w and 0, near x, one coordinate moved or zeroed, and anywhere."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(60, *w.shape, generator=g, dtype=w.dtype)
    near = [x + n * s for n, s in zip(noise, [1.0, 0.1, 1e-3] * 20, strict=True)]
    line = [w * a for a in torch.linspace(-0.5, 1.5, 41).tolist()]
    single = []
    for i in range(w.numel()):
        for value in (0.0, float(w.view(-1)[i]), float(x.view(-1)[i]) + 0.01, float(x.view(-1)[i]) - 0.01):
            moved = x.clone()
            moved.view(-1)[i] = value
            single.append(moved)
    return [*near, *line, *single]


def check_minimum(w: Tensor, x: Tensor, penalty: Callable[[Tensor], Tensor]) -> None:
    def f(v: Tensor) -> float:
        return float(0.5 * (v - w).square().sum() + penalty(v))

    for c in candidates(w, x):
        assert f(c) - f(x) >= 0.5 * float((c - x).square().sum()) - 1e-9


def positive_zeros(x: Tensor) -> bool:
    return not torch.signbit(x[x == 0]).any()


@given(WEIGHTS, SIZES, SIZES)
def test_l1_is_the_soft_threshold(values: list[float], lr: float, strength: float) -> None:
    w = torch.tensor(values, dtype=torch.float64).view(3, 4)
    x = stepped(w, lr, regularize.l1(strength))
    check_minimum(w, x, lambda v: lr * strength * v.abs().sum())
    assert (x[w.abs() <= lr * strength] == 0).all() and positive_zeros(x)


@given(WEIGHTS, SIZES, SIZES, st.sampled_from(["out", "in"]))
def test_group_lasso_is_the_group_soft_threshold(values: list[float], lr: float, strength: float, dim: str) -> None:
    w = torch.tensor(values, dtype=torch.float64).view(3, 4)
    x = stepped(w, lr, regularize.group_lasso(strength, dim))  # type: ignore[arg-type]
    along = 1 if dim == "out" else 0
    size = w.shape[along]
    check_minimum(w, x, lambda v: lr * strength * math.sqrt(size) * torch.linalg.vector_norm(v, dim=along).sum())
    gone = torch.linalg.vector_norm(w, dim=along) < lr * strength * math.sqrt(size)
    found = x if dim == "out" else x.T
    assert (found[gone] == 0).all()
    if lr * strength:
        assert positive_zeros(x)


@given(WEIGHTS, SIZES, SIZES)
def test_l1_then_group_lasso_is_the_sparse_group_lasso(values: list[float], a: float, b: float) -> None:
    w = torch.tensor(values, dtype=torch.float64).view(3, 4)
    x = stepped(w, 1.0, regularize.l1(a), regularize.group_lasso(b))
    check_minimum(w, x, lambda v: a * v.abs().sum() + b * 2 * torch.linalg.vector_norm(v, dim=1).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(WEIGHTS, SIZES)
def test_exact_zeros_in_every_dtype(dtype: torch.dtype, values: list[float], strength: float) -> None:
    w = torch.tensor(values, dtype=dtype).view(3, 4)
    x = stepped(w, 1.0, regularize.l1(strength))
    assert (x[w.abs() <= strength] == 0).all() and positive_zeros(x)
    assert (x * w >= 0).all() and (x.abs() <= w.abs()).all(), "no sign turns, nothing grows"
    wanted = (w.double().abs() - torch.tensor(strength, dtype=dtype).double()).clamp(min=0)
    torch.testing.assert_close(x.abs(), wanted.to(dtype), rtol=0, atol=0)
