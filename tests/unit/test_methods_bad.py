"""Solvers and criteria of data that do not do what they should: found out before anything is written, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur import Calibration, NotDefined
from secateur.errors import BadTensor, SecateurWarning
from tests.unit.calibrating import batches, choosing, mlp, refused

X = batches()


SOLVERS: dict[str, tuple[dict[str, Any], str]] = {
    "a criterion": ({"criterion": "wanda"}, "choosing decides by itself which weights go: leave criterion out"),
    "random": ({"criterion": "random"}, "decides by itself which weights go"),
    "rows": ({"pattern": "row"}, "prunes single weights and N:M, not the pattern row"),
    "blocks": ({"pattern": "4x4"}, "not the pattern 4x4"),
    "channels": ({"pattern": "channel"}, "not the pattern channel"),
    "one pool": ({"allocation": "global"}, 'say allocation="uniform" or another, not "global"'),
    "a threshold": ({"sparsity": None, "threshold": 0.1, "allocation": "global"}, "needs a count for every layer"),
    "weights that are not finite": ({"nonfinite": "keep"}, "all must be finite: leave nonfinite out"),
}


@pytest.mark.parametrize("case", SOLVERS)
def test_a_solver_with_what_it_has_no_use_for(case: str) -> None:
    how, text = SOLVERS[case]
    refused(NotDefined, text, mlp(), **{"criterion": "magnitude", "solver": choosing, "calibration": X, **how})


def returning(what: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    def bad(weight: Tensor, *, hessian: Tensor, pattern: Any, count: int, name: str) -> Any:
        new, mask, _, _ = choosing(weight, hessian=hessian, pattern=pattern, count=count, name=name)
        return what(new, mask)

    return bad


RETURNS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "nothing": (lambda w, m: None, r"the solver bad must return \(weight, mask\).*got a NoneType"),
    "a weight alone": (lambda w, m: (w,), "must return .*got a tuple"),
    "another shape": (
        lambda w, m: (w.T, m),
        r"must return a weight of real numbers of the shape \(20, 12\) for '0.weight'",
    ),
    "one row": (lambda w, m: (w[:1], m), "must return a weight of real numbers"),
    "a mask of numbers": (lambda w, m: (w, m.float()), "must return a mask of bool"),
    "a mask of another shape": (lambda w, m: (w, m[:, :3]), "must return a mask of bool of the shape"),
    "NaN": (lambda w, m: (w * math.nan, m), "returned 120 NaN or infinite weights for '0.weight'"),
    "another count": (
        lambda w, m: (w, torch.ones_like(m)),
        "prunes 0 weights of '0.weight'.* where 120 were asked for",
    ),
    "complex numbers": (lambda w, m: (w.to(torch.complex128), m), "must return a weight of real numbers"),
}


@pytest.mark.parametrize("case", RETURNS)
def test_what_a_solver_returns_is_looked_at(case: str) -> None:
    what, text = RETURNS[case]
    refused(BadTensor, text, mlp(), criterion="magnitude", solver=returning(what), calibration=X)


def test_a_solver_that_does_not_keep_to_what_is_there() -> None:
    model = mlp()
    model[0].weight.data[:10] = 0
    flip = returning(lambda w, m: (torch.ones_like(w), ~m))
    how: dict[str, Any] = {"criterion": "magnitude", "calibration": X}
    refused(BadTensor, "keeps weights of '0.weight'.* that are zero already", model, solver=flip, **how)
    pairs = returning(lambda w, m: (w, torch.arange(m.numel()).view(m.shape) % 4 > 0))
    how |= {"sparsity": None, "pattern": "2:4"}
    refused(BadTensor, "keeps more than 2 weights in a group of 4", mlp(), solver=pairs, **how)

    def other(weight: Tensor, *, hessian: Tensor, mask: Tensor, name: str) -> Any:
        return weight, ~mask

    refused(BadTensor, "returned another mask for '0.weight'", mlp(), solver=other, calibration=X)


def test_a_pair_from_a_solver_will_do() -> None:
    pair = returning(lambda w, m: (w, m))
    steps: list[Any] = []
    report = secateur.prune(mlp(), 0.5, solver=pair, calibration=Calibration(X, progress=steps.append))
    assert report.sparsity == 0.5 and steps[0].layers[0].loss is None


CRITERIA: dict[str, tuple[Callable[..., Any], str]] = {
    "another shape": (
        lambda weight, *, input_norm: weight[:1],
        r"must return a tensor of the weight's shape for '0.weight'",
    ),
    "a number": (lambda weight, *, input_norm: 3.0, "must return a tensor of the weight's shape.*got float"),
    "NaN": (
        lambda weight, *, input_norm: weight * math.nan,
        "returned NaN .*'0.weight'",
    ),
    "complex numbers": (lambda weight, *, input_norm: weight * 1j, "complex.* scores for '0.weight'"),
}


@pytest.mark.parametrize("case", CRITERIA)
@pytest.mark.parametrize("pattern", ["row", "unstructured", "2:4", "channel"])
def test_what_a_criterion_returns_is_looked_at(case: str, pattern: str) -> None:
    criterion, text = CRITERIA[case]
    more = {"sparsity": None} if pattern == "2:4" else {"allocation": "uniform"}
    refused(BadTensor, text, mlp(), criterion=criterion, calibration=X, pattern=pattern, **more)


def test_a_criterion_of_one_value_is_told() -> None:
    """Not of magnitude, of random, of a tensor of one weight, nor of zeros beside one value."""

    def constant(weight: Tensor, *, input_norm: Tensor) -> Tensor:
        return torch.full_like(weight, 3.0)

    text = r"constant gives all weights of a tensor one value, so they go by their index: 0\.weight"
    with pytest.warns(SecateurWarning, match=text):
        report = secateur.prune(mlp(), 0.5, criterion=constant, allocation="uniform", calibration=X, include="0")
    assert len(report.warnings) == 1 and report.zeros == 120
    pair = {n: torch.randn(4, 4) for n in ("a.weight", "b.weight")}
    for pattern in ("unstructured", "channel"):
        with pytest.warns(SecateurWarning, match=r"ones_like gives all .* one value.*: a\.weight, b\.weight$"):
            secateur.plan(pair, 0.5, criterion=torch.ones_like, allocation="uniform", pattern=pattern)
    same = torch.full((3, 4), 2.0)
    assert not secateur.plan(same, 0.5).warnings
    assert not secateur.plan(same, 0.5, criterion="random").warnings
    assert not secateur.plan(torch.tensor([5.0]), 0.1, criterion=lambda weight: weight).warnings
    assert not secateur.plan(torch.tensor([0.0, 0.0, 1.0]), 0.7, criterion=lambda weight: weight).warnings
