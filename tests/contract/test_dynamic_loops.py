"""Masks that move in the loops that people write: scalers, accumulation, closures, copies; and what cannot be is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import BadInput, BadTensor, NotDefined, PlanMismatch, Pruner, dynamic, schedules
from secateur.core.allocate import prune_count
from tests.contract.test_dynamic import HOW, LAST, UPDATES, by_sort, gradients, started
from tests.contract.training import OPTIMIZERS, batch, check_held, net, the_same, train

FIRST = UPDATES[0]


def everything(model: nn.Module, opt: torch.optim.Optimizer, pruner: Pruner) -> Any:
    return copy.deepcopy((model.state_dict(), opt.state_dict(), pruner.state_dict()))


@pytest.mark.parametrize("how", [*HOW, None])
@pytest.mark.parametrize("optimizer", ["sgd momentum", "adamw", "adamw fused", "sgd fused"])
def test_a_step_that_the_scaler_skips_neither_counts_nor_rewires(optimizer: str, how: str | None) -> None:
    model, opt, pruner = started("rigl", optimizer, rewire=HOW.get(how or ""))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(t: int, factor: float = 1.0) -> None:
        opt.zero_grad()
        x = batch(t)
        scaler.scale((model(x) - x.flip(1)).square().mean() * factor).backward()
        scaler.step(opt)
        scaler.update()

    for t in range(FIRST - 1):
        step(t)
    before = everything(model, opt, pruner)
    step(FIRST - 1, float("inf"))
    assert the_same(everything(model, opt, pruner), before)
    step(FIRST - 1)
    assert pruner.steps == FIRST
    assert the_same(pruner.state_dict()["masks"], before[2]["masks"]) == (how is None)
    check_held(model, pruner, opt)


def test_the_gradients_that_grow_are_those_of_all_micro_batches() -> None:
    model, opt, pruner = started("rigl")
    masks = pruner.masks()
    for t in range(FIRST):
        opt.zero_grad()
        dense = [gradients(model, batch(t)), gradients(model, batch(50 + t))]
        for x in (batch(t), batch(50 + t)):
            (model(x) - x.flip(1)).square().mean().backward()
            for name, mask in pruner.masks().items():
                grad = model.get_parameter(name).grad
                assert grad is not None and bool(grad[~mask].any()) == (t + 1 == FIRST)
        weights = {n: model.get_parameter(n).detach().clone() for n in masks}
        opt.step()
    for name, mask in masks.items():
        k = prune_count(int(mask.sum()), HOW["rigl"].fraction(FIRST))
        assert torch.equal(
            pruner.masks()[name], by_sort(mask, weights[name], (dense[0][name] + dense[1][name]).abs(), k)
        )


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_a_closure_is_called_once_a_step_and_gives_the_same(how: str, named: bool) -> None:
    a, b = started(how), started(how)
    train(a[0], a[1], range(LAST))
    calls = []

    def closure(t: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            calls.append(t)
            b[1].zero_grad()
            x = batch(t)
            loss: Tensor = (b[0](x) - x.flip(1)).square().mean()
            loss.backward()
            return loss

        return run

    for t in range(LAST):
        loss = b[1].step(closure=closure(t)) if named else b[1].step(closure(t))  # type: ignore[call-overload]
        assert loss is not None and float(loss.detach()) > 0
    assert calls == list(range(LAST)) and the_same(everything(*a), everything(*b))


def test_a_deep_copy_goes_its_own_way() -> None:
    for how in HOW:
        model, opt, pruner = started(how)
        train(model, opt, range(FIRST - 1))
        other, other_opt, other_pruner = copy.deepcopy((model, opt, pruner))
        before = everything(model, opt, pruner)
        train(other, other_opt, range(FIRST - 1, LAST))
        assert the_same(everything(model, opt, pruner), before)
        train(model, opt, range(FIRST - 1, LAST))
        assert the_same(everything(model, opt, pruner), everything(other, other_opt, other_pruner))


def test_a_tensor_without_a_gradient_is_left_as_it_is() -> None:
    model, opt, pruner = started("rigl")
    before, values = pruner.masks(), copy.deepcopy(model.state_dict())
    for t in range(FIRST):
        opt.zero_grad()
        model[:3](batch(t)).square().mean().backward()  # type: ignore[index]
        opt.step()
    after = pruner.masks()
    assert torch.equal(after["4.weight"], before["4.weight"]) and not torch.equal(after["2.weight"], before["2.weight"])
    assert torch.equal(model.get_parameter("4.weight"), values["4.weight"])


def test_a_dense_layer_stays_dense_and_a_tied_one_tied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    allocation = {"0.weight": 0.5, "4.weight": 0.0}
    pruner = Pruner(model, opt, schedules.constant(0.5), allocation=allocation, rewire=dynamic.rigl(every=2, end=9))
    first = pruner.masks()["0.weight"]
    for t in range(8):
        opt.zero_grad()
        model(batch(t)).square().mean().backward()
        opt.step()
        check_held(model, pruner, opt)
    assert pruner.masks()["4.weight"].all() and int(pruner.masks()["0.weight"].sum()) == 32
    assert model[0].weight is model[2].weight and not torch.equal(pruner.masks()["0.weight"], first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused_before_anything_is_touched(value: float) -> None:
    model, opt, pruner = started("rigl")
    train(model, opt, range(FIRST - 1))
    opt.zero_grad()
    model(batch(0)).square().mean().backward()
    grad = model.get_parameter("4.weight").grad
    assert grad is not None
    grad[0, 0] = value
    before = everything(model, opt, pruner)
    with pytest.raises(
        BadTensor, match=rf"at step {FIRST}: the gradient of '4\.weight' \(shape \(8, 12\).* holds 1 NaN"
    ):
        opt.step()
    assert the_same(everything(model, opt, pruner), before)
    train(model, opt, range(FIRST - 1, FIRST))
    assert pruner.steps == FIRST


@pytest.mark.parametrize("how", HOW)
def test_weights_that_are_not_finite_are_refused_with_the_step(how: str) -> None:
    model, opt, pruner = started(how)
    train(model, opt, range(FIRST - 1))
    name, mask = next(iter(pruner.masks().items()))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[mask.flatten().nonzero()[0]] = float("nan")
    before = pruner.state_dict()["masks"]
    opt.zero_grad()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(BadTensor, match=rf"at step {FIRST}: {name!r}.* holds 1 NaN"):
        opt.step()
    assert the_same(pruner.state_dict()["masks"], before)


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no schedule": (NotDefined, "constant sparsity", {"schedule": None}),
    "gradual": (NotDefined, "constant sparsity", {"schedule": schedules.cubic(0.5, begin=0, end=9)}),
    "later": (NotDefined, "constant sparsity", {"schedule": schedules.one_shot(0.5, at=1)}),
    "nothing": (NotDefined, "above 0", {"schedule": schedules.constant(0.0)}),
    "a function": (NotDefined, "constant sparsity", {"schedule": lambda t: 0.5}),
    "N:M": (NotDefined, "2:4", {"pattern": "2:4"}),
    "channels": (NotDefined, "channel", {"pattern": "channel"}),
    "regrow": (NotDefined, "regrow", {"regrow": True}),
    "dense gradients": (NotDefined, "grad_mask", {"grad_mask": False}),
    "a name": (BadInput, "dynamic.rigl", {"rewire": "rigl"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_before_anything_is_touched(case: str) -> None:
    error, words, choice = REFUSED[case]
    model = net()
    before = copy.deepcopy(model.state_dict())
    given = {"schedule": schedules.constant(0.5), "rewire": HOW["rigl"], **choice}
    with pytest.raises(error, match=words):
        Pruner(model, torch.optim.SGD(model.parameters()), **given)
    assert the_same(model.state_dict(), before)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_optimizers_that_do_not_go_with_it_are_refused() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    whole, part = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](model[2].parameters())  # type: ignore[index]
    for bad, error, words in [
        ([whole, part], NotDefined, "several"),
        ([part, whole], NotDefined, "several"),
        (part, BadInput, r"not all .*0\.weight, 4\.weight"),
    ]:
        with pytest.raises(error, match=words):
            Pruner(model, bad, schedules.constant(0.5), rewire=HOW["set"])
        assert the_same(model.state_dict(), before)
    pruner = Pruner(model, None, schedules.constant(0.5), rewire=HOW["set"])
    with pytest.raises(NotDefined, match="attach"):
        pruner.step()
    pruner.attach(whole)
    train(model, whole, range(FIRST))
    assert pruner.steps == FIRST
    with pytest.raises(NotDefined, match="several"):
        pruner.attach(OPTIMIZERS["adam"](model.parameters()))


def test_a_state_of_another_sparsity_is_refused() -> None:
    _, _, pruner = started("rigl")
    other = Pruner(net(), None, schedules.constant(0.5), rewire=HOW["rigl"])
    before = other.state_dict()
    with pytest.raises(PlanMismatch, match=r"0\.75.*0\.5"):
        other.load_state_dict(pruner.state_dict())
    assert the_same(other.state_dict(), before)


def test_closed_it_leaves_nothing_behind() -> None:
    model, opt, pruner = started("rigl")
    pruner.close()
    train(model, opt, range(FIRST))
    assert pruner.steps == 0 and all(p.grad is not None for p in model.parameters())
