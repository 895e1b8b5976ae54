"""What a regulariser refuses, by name, before anything is touched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from secateur import BadInput, BadTensor, NotDefined, NothingChosen, regularize
from tests.contract.training import net, the_same
from tests.unit.test_regularize import still, values


@pytest.mark.parametrize("make", [regularize.l1, regularize.weight_decay, regularize.group_lasso])
@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf, True, "0.1", None, torch.tensor(0.1)])
def test_a_strength_is_a_finite_number(make: Any, strength: Any) -> None:
    with pytest.raises(BadInput, match="strength is a finite number"):
        make(strength)


def test_methods_and_dims_have_names() -> None:
    with pytest.raises(BadInput, match='"proximal" or "penalty"; got \'prox\''):
        regularize.l1(0.1, "prox")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match='dim is "out" or "in"; got 0'):
        regularize.group_lasso(0.1, 0)  # type: ignore[arg-type]


class NoRate(torch.optim.Optimizer):
    """Has no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


def test_what_cannot_be_is_refused_before_anything_is_touched() -> None:
    model = net()
    how = regularize.l1(0.1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    lbfgs, no_rate = torch.optim.LBFGS(model.parameters()), NoRate([*model[0].parameters()])
    foreign = torch.optim.SGD(net().parameters())
    before = values(model)
    cases: list[tuple[Any, Any, Any, dict[str, Any], type[Exception], str]] = [
        (torch.ones(3), sgd, how, {}, BadInput, "a module in training, got Tensor"),
        (model, None, how, {}, BadInput, "must be a torch optimizer, got NoneType"),
        (model, lbfgs, how, {}, NotDefined, "LBFGS"),
        (model, foreign, how, {}, BadInput, "holds none of the parameters that are regularised"),
        (model, no_rate, how, {}, BadInput, 'groups of NoRate have no "lr"'),
        (model, sgd, 0.1, {}, BadInput, "how is made by"),
        (model, sgd, "l1", {}, BadInput, "how is made by"),
        (model, sgd, how, {"include": "7"}, NothingChosen, "include='7' matches nothing"),
        (model, sgd, how, {"ignore": "7"}, NothingChosen, "ignore='7' matches nothing"),
        (model, sgd, how, {"ignore": "*"}, NothingChosen, "nothing to prune"),
        (net().to(torch.float8_e5m2), sgd, how, {}, BadTensor, r"'0\.weight'.*float8"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), sgd, how, {}, BadTensor, "parametrisation"),
        (net().requires_grad_(False), sgd, how, {}, BadInput, "frozen"),
    ]
    for target, optimizer, given, more, error, words in cases:
        with pytest.raises(error, match=words):
            regularize.attach(target, optimizer, given, **more)
    frozen = net()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(BadInput, match=r"'0\.weight'.*frozen"):
        regularize.attach(frozen, torch.optim.SGD(frozen.parameters()), how, include="0.weight")
    still(model, sgd)
    assert the_same(values(model), before), "no hook was left behind"


def test_a_sparse_gradient_takes_no_penalty() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    model.weight.data[0, 0] = 1e-6
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = regularize.attach(model, opt, regularize.l1(0.1, "penalty"), include="weight")
    model(torch.tensor([1])).sum().backward()
    before = values(model)
    with pytest.raises(BadTensor, match=r"'weight'.*sparse gradient"):
        opt.step()
    assert the_same(values(model), before)
    handle.close()
    regularize.attach(model, opt, regularize.l1(0.1), include="weight")
    opt.step()
    assert model.weight[0, 0] == 0
