"""A Pruner in loops that slip: gradients left over when a mask changes, steps that never come, states that do not fit."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur import BadInput, BadTensor, Infeasible, NotDefined, PlanMismatch, Pruner, SecateurWarning, schedules
from tests.contract.training import batch, check_held, net, the_same, train


def test_an_optimizer_that_steps_after_the_mask_has_changed_brings_nothing_back() -> None:
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    pruner = Pruner(model, [first, second], schedules.cubic(0.75, begin=0, end=4))
    for t in range(6):
        first.zero_grad()
        second.zero_grad()
        model(batch(t)).square().mean().backward()
        first.step()
        second.step()
        check_held(model, pruner, first)
        check_held(model, pruner, second)
    assert pruner.sparsity == 0.75


@pytest.mark.parametrize("rewire", [None, secateur.dynamic.random_growth(every=2, end=8)])
def test_a_second_step_on_the_same_gradients_brings_nothing_back(rewire: Any) -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = schedules.one_shot(0.75, at=2) if rewire is None else schedules.constant(0.75)
    pruner = Pruner(model, opt, schedule, rewire=rewire)
    train(model, opt, range(2))
    opt.step()
    check_held(model, pruner, opt)
    assert pruner.sparsity == 0.75


@pytest.mark.parametrize("attached", [True, False])
def test_gradients_from_before_the_pruner_bring_nothing_back(attached: bool) -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, opt, range(2))
    secateur.prune(model, 0.5)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt if attached else None)
    opt.step()
    assert check_held(model, pruner, opt) > 0


def test_a_sparse_gradient_is_named() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 4))
    Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), schedules.constant(0.5), include="0.weight")
    with pytest.raises(BadTensor, match=r"\(10, 8\) is sparse"):
        model(torch.arange(4)).square().mean().backward()


@pytest.mark.parametrize(
    "choice", [{"pattern": "2:4"}, {"max_sparsity": 0.5}, {"allocation": "uniform", "min_keep": 100}]
)
def test_an_end_that_cannot_be_reached_is_refused_before_training(choice: dict[str, Any]) -> None:
    model = net()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises((NotDefined, Infeasible)):
        Pruner(model, None, schedules.cubic(0.9, begin=2, end=8, initial=0.1), **choice)
    with pytest.raises((NotDefined, Infeasible)):
        Pruner(model, None, schedules.join([schedules.constant(0.1), schedules.one_shot(0.9, at=5)], [3]), **choice)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_ac_dc_that_may_not_regrow_is_refused() -> None:
    with pytest.raises(BadInput, match="regrow=True"):
        Pruner(net(), None, schedules.ac_dc(0.75, begin=1, end=7, sparse=2, dense=2))


def test_an_attached_optimizer_that_makes_no_steps_is_warned_of() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    mine, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    Pruner(model, mine, schedules.one_shot(0.5, at=1))
    with pytest.warns(SecateurWarning, match="attach the optimizer whose steps are made"):
        for _ in range(100):
            model(torch.ones(1, 4)).sum().backward()
            other.step()


def test_a_layer_that_is_left_with_nothing_is_warned_of_once() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    Pruner(model, opt, schedules.linear(0.9, begin=1, end=6))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, opt, range(8))
    (text,) = [str(w.message) for w in caught]
    assert re.match(r"at step [2-6]: left with nothing: 2\.weight; cap", text)


def test_what_a_function_asks_for_in_vain_is_told_with_the_step() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    Pruner(model, opt, lambda t: 0.5 if t < 3 else float("nan"))
    with pytest.raises(BadInput, match=r"at step 3: .* got nan"):
        train(model, opt, range(5))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2,)])
def test_a_deep_copy_follows_its_optimizer_in_whatever_order(order: tuple[int, ...]) -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt, schedules.cubic(0.75, begin=1, end=6))
    train(model, opt, range(3))
    parts = copy.deepcopy([(model, opt, pruner)[i] for i in order])
    other = parts[order.index(2)]
    (follows,) = other._optimizers
    train(other._model, follows, range(3, 8))
    train(model, opt, range(3, 8))
    if len(order) > 1:
        assert follows is parts[order.index(1)] and other._model is parts[order.index(0)]
    assert other.steps == 8 and the_same(other.state_dict(), pruner.state_dict())


def _without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: {"version": 1},
        lambda s: {**s, "version": 2},
        lambda s: _without(s, "masks"),
        lambda s: {**s, "masks": _without(s["masks"], "2.weight")},
        lambda s: {**s, "masks": {**s["masks"], "2.weight": [1, 2]}},
        lambda s: {**s, "steps": "3"},
        lambda s: {**s, "value": float("nan")},
    ],
)
def test_a_state_that_is_not_whole_is_refused_before_anything_is_touched(spoil: Any) -> None:
    model = net()
    pruner = Pruner(model, None, schedules.constant(0.5))
    other = Pruner(net(1), None, schedules.constant(0.75))
    before = copy.deepcopy((model.state_dict(), pruner.state_dict()))
    with pytest.raises((BadInput, PlanMismatch)):
        pruner.load_state_dict(spoil(other.state_dict()))
    assert the_same((model.state_dict(), pruner.state_dict()), before)


def test_state_that_is_loaded_from_a_dense_run_brings_nothing_back() -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, opt, range(3))
    dense = copy.deepcopy(opt.state_dict())
    secateur.prune(model, 0.5)
    pruner = Pruner(model, opt)
    opt.load_state_dict(dense)
    train(model, opt, range(3, 6), lambda: check_held(model, pruner, opt) and None)


def test_what_was_closed_is_not_attached_again() -> None:
    model = net()
    pruner = Pruner(model, None, schedules.constant(0.5))
    pruner.close()
    with pytest.raises(BadInput, match="closed"):
        pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("foreach", [False, True])
def test_in_float16_the_step_of_adam_leaves_zeros_and_not_nan(foreach: bool) -> None:
    model = net().half()
    secateur.prune(model, 0.5)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=foreach)
    pruner = Pruner(model, opt)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert check_held(model, pruner, opt) > 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_model_that_was_cast_is_named() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    Pruner(model, opt, schedules.one_shot(0.5, at=1))
    model.double()
    with pytest.raises(BadTensor, match=r"at step 1: '0.weight' .* is torch.float64 now"):
        model(torch.ones(1, 8).double()).square().mean().backward()
        opt.step()


def test_a_target_of_the_users_own_is_not_read() -> None:
    class Own:
        target = "a file"

        def __call__(self, step: int) -> float:
            return 0.5

    assert Pruner(net(), None, Own()).sparsity == 0.5
